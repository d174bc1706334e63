"""python -m fdk.bench"""

import sys

from fdk.bench import main
from fdk.cli.output import until_the_reader_leaves

sys.exit(until_the_reader_leaves(main))
