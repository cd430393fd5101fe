"""What MCP calls over Streamable HTTP mean: method, tool, session, outcome. Reads bodies with gateway.llm."""
