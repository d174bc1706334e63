"""python -m fdk.bench"""

import sys

from fdk.bench import main

sys.exit(main())
