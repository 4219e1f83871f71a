"""`python -m glm5 VERB ...`, also for several processes: `torchrun --nproc-per-node 2 -m glm5 VERB ...`."""

import sys

from glm5.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
