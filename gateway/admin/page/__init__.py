"""The page: what agents did, for people, on the admin's TCP listener. Plain HTML from the server; see README.md."""
