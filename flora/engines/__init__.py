"""The engines: what carries messages between the server and the clients. `local` is one process on one machine."""
