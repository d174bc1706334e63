"""python -m fdk.bench.variants"""

import sys

from fdk.bench.variants import main

sys.exit(main())
