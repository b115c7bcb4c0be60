"""What the launch scripts that take a configuration share."""
import sys

from absl import app


def parse(argv: list[str]) -> list[str]:
    """absl's parser, which shows a traceback for an unknown configuration key."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, TypeError) as error:
        sys.exit(f"error in --config: {error}")
