"""OpenAI's HTTP interface to the gateway: the same generations, asked for and told in JSON."""
