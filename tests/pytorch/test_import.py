"""The package imports at once, without PyTorch, and its help reads well."""

import os
import pydoc
import re
import subprocess
import sys
import unittest

from common import ROOT


class Import(unittest.TestCase):
    def test_it_takes_less_than_a_tenth_of_a_second_and_no_pytorch(self):
        source = (
            "import time, sys; begun = time.perf_counter(); import ganglion; took = time.perf_counter() - begun;"
            "print(took, 'torch' in sys.modules, 'numpy' in sys.modules)"
        )
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'python'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        # The shortest of three: others use this machine too.
        said = [
            subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, text=True, env=environment)
            for _ in range(3)
        ]
        took, *loaded = min(run.stdout.split() for run in said)
        self.assertLess(float(took), 0.1)
        self.assertEqual(loaded, ["False", "False"])

    def test_every_public_name_is_there_and_documented(self):
        import ganglion
        from ganglion._programs import TORCH_VERSION

        for name in ganglion.__all__:
            value = getattr(ganglion, name)
            self.assertTrue(value.__doc__ and not value.__doc__.startswith(f"{name}("), f"{name} has no docstring")
            if isinstance(value, type):
                for part, member in vars(value).items():
                    if callable(member) and not part.startswith("_") and part not in ("message",):
                        self.assertTrue(member.__doc__, f"{name}.{part} has no docstring")
        wanted = (ROOT / "deploy/requirements/libtorch-cpu.in").read_text()
        self.assertIn(f"torch=={TORCH_VERSION}\n", wanted)
        with self.assertRaises(AttributeError):
            _ = ganglion.nothing
        text = re.sub(".\b", "", pydoc.render_doc(ganglion))
        for name in ("export(", "check(", "class Objective"):
            self.assertIn(name, text)


if __name__ == "__main__":
    unittest.main()
