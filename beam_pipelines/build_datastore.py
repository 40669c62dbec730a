"""`resmem build` under the name that a Beam user looks for.

    python -m beam_pipelines.build_datastore --gin_file=configs/demo.gin --workdir=runs/demo \\
        --pipeline_options="--runner=PortableRunner --job_endpoint=embed --environment_type=LOOPBACK"
"""

import sys

from resmem_lm.main import main

if __name__ == "__main__":
    sys.exit(main(["build", *sys.argv[1:]]))
