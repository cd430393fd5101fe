.DELETE_ON_ERROR:
help: ; @echo skeleton
