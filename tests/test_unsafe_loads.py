"""unsafe_loads.py: each way to read a stranger's bytes as code is found under any name, and what is safe is let be."""

import pytest
from unsafe_loads import unsafe_loads

pytestmark = [pytest.mark.reliability, pytest.mark.fast]

UNSAFE = [
    "import pickle as p\np.load(f)",
    "from pickle import loads as l\nl(b)",
    "import pickle\nload = pickle.load\nload(f)",
    "import _pickle\n_pickle.loads(b)",
    "import pickle\nclass U(pickle.Unpickler): pass",
    "from pickle import *",
    "import marshal\nmarshal.loads(b)",
    "from marshal import load as m\nm(f)",
    "import shelve\nshelve.open(p)",
    "import dill as pickle2\npickle2.load(f)",
    "import cloudpickle\ncloudpickle.loads(b)",
    "from joblib import load\nload(p)",
    "import joblib\njoblib.load(p)",
    "import runpy\nrunpy.run_path(p)",
    "import torch\ngetattr(torch, 'load')(f)",
    "import torch as t\nt.load(f)",
    "from torch import load as read\nread(f)",
    "import torch\nread = torch.load\nread(f, weights_only=False)",
    "import torch\npartial(torch.load, map_location='cpu')",
    "import torch\ntorch.load(f, **options)",
    "import torch\ntorch.load(f, 'cpu', pickle)",
    "import torch\ntorch.load(f, weights_only=choice)",
    "import torch\ntorch.serialization.add_safe_globals([C])",
    "import torch\ntorch.jit.load(f)",
    "import torch.package\ntorch.package.PackageImporter(p)",
    "import torch\nvars(torch)['load'](f)",
    "import torch\ntorch.__dict__['load'](f)",
    "import torch\ngetattr(torch, name)(f)",
    "import torch\nread(f, **{'weights_only': False})",
    "import sys\nsys.modules['pickle'].loads(b)",
    "import sys\nsys.modules[name].loads(b)",
    "__import__('pickle').loads(b)",
    "import importlib\nimportlib.import_module('pickle').load(f)",
    "from importlib import import_module as i\ni(n).load(f)",
    "from operator import attrgetter as a\na('load')(torch)(f)",
    "import yaml as y\ny.load(f, y.Loader)",
    "from yaml import unsafe_load as safe_load\nsafe_load(f)",
    "from yaml import Loader\nclass L(Loader): pass",
    "import yaml\nyaml.full_load(f)",
    "import numpy as n\nn.load(f, allow_pickle=True)",
    "import numpy\nnumpy.load(f, None, True)",
    "from numpy import load\nload(f, allow_pickle=not False)",
    "import numpy as np\nread = np.load\nmap(read, files)",
    "import numpy as np\nnp.lib.format.read_array(f, True)",
    "import pandas as q\nq.read_pickle(p)",
    "e = eval\ne(text)",
    "import builtins as b\nb.exec(text)",
    "getattr(__builtins__, 'exec')(text)",
    "def f(run=eval): run(t)",
    "(load := pickle.loads)(b)",
    "b = a\na = pickle.loads\nb(x)",
    "map(eval, lines)",
]
SAFE = [
    "import pickle\npickle.dump(x, f, protocol=pickle.HIGHEST_PROTOCOL)",
    "import numpy as np\nnp.load(f, mmap_mode='r', allow_pickle=False)",
    "import torch\ntorch.load(f, map_location='cpu', weights_only=True)",
    "import yaml\nclass L(yaml.SafeLoader): pass\nyaml.safe_load(f)",
    "model.eval()",
    "class C:\n    eval: E = E()",
    "getattr(options, name)",
    "import json\njson.load(f)",
    "from safetensors.torch import load_file as load\nload(f)",
    "def load(f): return f\nload(1)",
    "import re\nre.compile(p)",
    "import torch\ngetattr(torch.cpu, 'get_capabilities', dict)()",
]


@pytest.mark.parametrize("source", UNSAFE)
def test_loads_that_run_code_are_found_by_any_name(source):
    """Row 10."""
    assert unsafe_loads(source)


@pytest.mark.parametrize("source", SAFE)
def test_what_is_safe_is_let_be(source):
    assert unsafe_loads(source) == []


def test_only_what_is_allowed_is_allowed():
    source = "import pickle\nclass U(pickle.Unpickler): pass"
    assert unsafe_loads(source, ("pickle.Unpickler",)) == []
    assert len(unsafe_loads(source + "\npickle.loads(b)", ("pickle.Unpickler",))) == 1
