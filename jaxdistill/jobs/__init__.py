"""What the commands do: each job owns its files, messages and devices."""
