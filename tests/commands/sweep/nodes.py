"""A Ray cluster on loopback in a process of its own: nodes of one logical CPU, which come and go as its reader says.

Reads ``add`` and ``remove`` from standard input; writes the head's address, and the number of an added node's raylet.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path


def main() -> None:
    size = 80 * 2**20
    with tempfile.TemporaryDirectory(prefix="toys-") as folder:
        os.environ["RAY_TMPDIR"] = folder
        (Path(folder) / "ray").mkdir()
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 1, "object_store_memory": size, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            print(cluster.address, flush=True)
            for line in sys.stdin:
                if line.strip() == "add":
                    node = cluster.add_node(num_cpus=1, object_store_memory=size)
                    print(node.all_processes["raylet"][0].process.pid, flush=True)
                else:
                    cluster.remove_node(node, allow_graceful=False)
                    print("removed", flush=True)
        finally:
            cluster.shutdown()


if __name__ == "__main__":
    main()
