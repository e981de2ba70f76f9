"""The `hyspark` command: one module per subcommand, each with an `add_parser(subparsers)`."""
