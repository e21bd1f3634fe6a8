"""Start the Hub from a shell: `python tests/local_hub --folder /tmp/hub`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from local_hub.server import main

if __name__ == "__main__":
    main()
