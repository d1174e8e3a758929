"""Joins the processes of a run and lets them agree on decisions.

Every process runs the same program on its own rows of the batch. Process 0
alone writes the run's files (config, metrics, pictures, report); every process
writes its own shards of the checkpoints. Therefore every host must see WORKDIR
and the data under the same path.

On TPU pods set E2E_VLP_DISTRIBUTED=auto, and jax asks the platform for the
processes. Elsewhere the launch scripts set three variables:
  E2E_VLP_COORDINATOR   host:port of process 0
  E2E_VLP_PROCESSES     number of processes
  E2E_VLP_PROCESS       number of this process
If one is missing after E2E_VLP_JOIN_TIMEOUT seconds, the run ends instead of
holding the other machines for hours. By default that is 300, where all
processes start together, and 1800 on TPU pods, where a slice that is repaired
or newly made can come half an hour after the others.
"""
import ipaddress
import os
import re
import socket
import sys
import threading
import time

import jax
from jax.experimental import multihost_utils
import numpy as np

from e2e_vlp_jax import errors

_VARIABLES = ('E2E_VLP_COORDINATOR', 'E2E_VLP_PROCESSES', 'E2E_VLP_PROCESS')
_NAME_BYTES = 64  # longest host name that processes send each other


def join():
  """Joins the other processes, if there are any.

  Call it before devices are used. Process 0 prints the hosts that joined. If
  one is late, every process prints a line and ends with exit code 75. This is
  not the user's mistake, so the launchers start the run again.

  Raises:
    UserError: a variable is missing or not valid.
  """
  automatic = os.environ.get('E2E_VLP_DISTRIBUTED', '')
  found = [os.environ.get(v) for v in _VARIABLES]
  if automatic not in ('', 'auto'):
    raise errors.UserError(f'E2E_VLP_DISTRIBUTED: {automatic!r}; the one '
                           "choice is 'auto'")
  if not automatic and not any(found):
    return
  if not automatic and not all(found):
    missing = ', '.join(v for v, x in zip(_VARIABLES, found) if not x)
    raise errors.UserError(
        f'{missing}: not set, but a run of several processes needs '
        f'{", ".join(_VARIABLES)}')
  timeout = _integer('E2E_VLP_JOIN_TIMEOUT', '1800' if automatic else '300', 1)
  address, options = 'the platform', {}
  if not automatic:
    address, count = found[0], _integer(_VARIABLES[1], found[1], 1)
    if not re.fullmatch(r'.+:\d+', address):
      raise errors.UserError(f'{_VARIABLES[0]}: {address!r}, expected '
                             'host:port of process 0')
    # Under srun, jax would also read Slurm's variables and use only the GPU
    # SLURM_LOCALID. All visible devices belong to this process.
    options = dict(coordinator_address=address, num_processes=count,
                   process_id=_integer(_VARIABLES[2], found[2], 0, count - 1),
                   cluster_detection_method='deactivate')
  # CPU processes exchange arrays through gloo; accelerators ignore this.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')

  def give_up():
    print(f'error: E2E_VLP_COORDINATOR: process '
          f'{options.get("process_id", "?")} of '
          f'{options.get("num_processes", "?")} waited {timeout} s at '
          f'{address}; {_who_joined(options)}', file=sys.stderr, flush=True)
    # jax is blocked in C++ and would abort with a dump.
    os._exit(errors.EXIT_TRY_AGAIN)
  watch = threading.Timer(timeout, give_up)
  watch.daemon = True
  start = time.perf_counter()
  watch.start()
  jax.distributed.initialize(initialization_timeout=timeout + 60, **options)
  watch.cancel()
  sys.excepthook = _leave
  seconds = time.perf_counter() - start
  name = socket.gethostname().encode()[:_NAME_BYTES].ljust(_NAME_BYTES)
  names = multihost_utils.process_allgather(np.frombuffer(name, np.uint8))
  if jax.process_index() == 0:
    for i, one in enumerate(np.atleast_2d(names)):
      print(f'process {i}: {bytes(one).decode().strip()}')
    print(f'{jax.process_count()} processes, {jax.device_count()} devices '
          f'({jax.local_device_count()} here), joined in {seconds:.1f} s',
          flush=True)


def _leave(kind, error, trace):
  """Ends a process at its first exception, which the others must notice.

  Otherwise jax waits minutes for the others, and they wait for this one.
  """
  sys.__excepthook__(kind, error, trace)
  sys.stderr.flush()
  os._exit(130 if kind is KeyboardInterrupt else 1)


def leave(code):
  """Ends this process; one that is to start again does not wait for the others.

  A mistake is found by all processes, a failing disk perhaps by one alone.

  Args:
    code: exit code.
  """
  if code == errors.EXIT_TRY_AGAIN and jax.distributed.is_initialized():
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  sys.exit(code)


def _who_joined(options):
  """Describes, in a few words, which other processes have joined."""
  if 'coordinator_address' not in options:
    return 'not all hosts of the platform joined'
  host, _, port = options['coordinator_address'].rpartition(':')
  if options['process_id']:
    try:
      socket.create_connection((host, int(port)), 2).close()
    except OSError as e:
      return f'nobody answers there ({e.strerror or e})'
    return 'process 0 answers there, others are missing'
  peers = _connected(host, int(port))
  return (f'{len(peers)} of {options["num_processes"] - 1} peers seen'
          + (': ' + ', '.join(peers) if peers else ''))


def _connected(host, port):
  """Addresses of the peers connected to our `port`, from Linux's /proc."""
  found = []
  for path in ('/proc/net/tcp', '/proc/net/tcp6'):
    try:
      with open(path) as f:
        rows = [line.split() for line in f.readlines()[1:]]
    except OSError:
      continue
    for row in rows:
      (_, local), (address, _) = (x.split(':') for x in row[1:3])
      if int(local, 16) == port and row[3] == '01':  # established
        # The kernel writes each 32-bit word in the machine's byte order.
        words = [bytes.fromhex(address[i:i + 8])[::-1]
                 for i in range(0, len(address), 8)]
        ip = ipaddress.ip_address(b''.join(words))
        found.append(str(getattr(ip, 'ipv4_mapped', None) or ip))
  try:
    own = socket.gethostbyname(host)  # We are also connected to ourselves.
  except OSError:  # A name that others know; `give_up` must go on.
    own = None
  for address in found:
    if address == own or ipaddress.ip_address(address).is_loopback:
      found.remove(address)
      break
  return found


def agreed(flag):
  """Process 0's `flag`, on every process; all must call this together."""
  if jax.process_count() == 1:
    return bool(flag)
  return bool(multihost_utils.broadcast_one_to_all(np.int32(flag)))


def everywhere(flag):
  """Whether `flag` is true on every process; all must call this together."""
  if jax.process_count() == 1:
    return bool(flag)
  return bool(np.all(multihost_utils.process_allgather(np.int32(flag))))


def wait_for_all(what):
  """Returns when every process has called this."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def _integer(name, text, least, most=2**31):
  text = os.environ.get(name, text)
  if not re.fullmatch(r'\d+', text) or not least <= int(text) <= most:
    raise errors.UserError(f'{name}: {text!r}, expected a whole number from '
                           f'{least} to {most}')
  return int(text)
