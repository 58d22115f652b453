"""The system on this machine: its processes, and the file that says where they listen."""
