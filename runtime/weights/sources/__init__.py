"""Where a model's files come from: Hub, S3, local folder, wheel."""
