"""`python -m moyu_train`, which `accelerate launch -m moyu_train …` starts in every process."""

import sys

from moyu_train.cli import main

sys.exit(main())
