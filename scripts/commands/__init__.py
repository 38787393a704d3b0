"""The subcommands of `trtvlm`: one file each, with a click command named `command`."""
