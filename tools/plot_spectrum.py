"""Draw singular values of what training added to every projection. See --help."""

import sys

from relora_ds.cli.views.plot_spectrum import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
