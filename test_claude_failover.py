#!/usr/bin/env python3
"""Tests of claude_failover.py: python3 test_claude_failover.py

Sections and their order are those of the program; fakes and builders come first.  Nothing
sleeps and nothing leaves this machine: clocks are moved by hand, servers listen on port 0,
HOME is a temporary folder.  Tests with real clients skip where those are not installed.
"""
import ast
import base64
import collections
import contextlib
import copy
import email.utils
import gzip
import http.client
import io
import itertools
import json
import os
import platform
import plistlib
import queue
import random
import re
import select
import selectors
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import unittest
import warnings
import zlib
from collections import namedtuple
from unittest import mock

import claude_failover as cf

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.join(HERE, 'claude_failover.py')
START = 1_700_000_000.0       # a unix time for wall clocks
PATIENCE_S = 10               # for threads to meet; never slept through
OPUS, SONNET, HAIKU = 'claude-opus-5-5', 'claude-sonnet-5-5', 'claude-haiku-5-5'
#: Where .ci/run installs them; any folder of the same shape will do.
CLIENTS = os.environ.get('CLAUDE_FAILOVER_CLIENTS') or os.path.expanduser(
    '~/.cache/claude-failover-test-clients')
CLAUDE = os.path.join(CLIENTS, 'npm', 'node_modules', '.bin', 'claude')
NODE_SDK = os.path.join(CLIENTS, 'npm', 'node_modules', '@anthropic-ai', 'sdk')
SDK_PYTHON = os.path.join(CLIENTS, 'venv', 'bin', 'python')


# ==============================================================================
# Fakes and builders
# ==============================================================================

class FakeClock:
    """A clock that is moved by hand; `wait` moves it too, instead of waiting."""

    def __init__(self, now=1000.0):
        self.now = now
        self.on_wait = lambda seconds: None

    def __call__(self):
        return self.now

    def unix_s(self):
        """The wall clock, which goes along."""
        return START + self.now - 1000

    def wait(self, event, seconds):
        self.on_wait(seconds)
        self.now += seconds
        return event.is_set()


def make_document(*key_ids, **changes):
    """A configuration document with Anthropic keys 'a', 'b', ... on a free port."""
    keys = {id: {'token': token_of(id), 'label': id, 'type': 'api-key'} for id in key_ids}
    return {'profiles': {'default': {'port': 0, 'keyOrder': list(key_ids)}}, 'keys': keys,
            **changes}


def make_config(*key_ids, **changes):
    return cf.parse_config(make_document(*key_ids, **changes))


def token_of(key_id):
    return f'sk-ant-api03-{key_id}-0123456789abcdef0123456789abcdef'


def openai_token_of(key_id):
    return f'sk-proj-{key_id}-0123456789abcdef0123456789abcdef'


def make_login(**claims):
    """A ChatGPT login: a JSON Web Token whose signature nobody checks."""
    def part(value):
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip('=')
    account = {'https://api.openai.com/auth': {'chatgpt_account_id': 'acc-1'}, 'exp': START + 3600}
    return '.'.join([part({'alg': 'none'}), part({**account, **claims}), 'c2lnbmF0dXJl'])


def with_openai(*openai_ids, **changes):
    """The fields of a document that add OpenAI keys, in use."""
    keys = {id: {'token': openai_token_of(id), 'label': id, 'type': 'api_key'}
            for id in openai_ids}
    return {'openaiKeys': keys, 'openaiModelFallback': True, **changes}


def messages_body(**changes):
    return {'model': OPUS, 'max_tokens': 100, 'messages': [{'role': 'user', 'content': 'hi'}],
            **changes}


def api_error(type, message):
    return {'type': 'error', 'error': {'type': type, 'message': message}}


MESSAGE = {'id': 'msg_1', 'type': 'message', 'role': 'assistant', 'model': OPUS,
           'stop_reason': 'end_turn', 'content': [{'type': 'text', 'text': 'hello'}],
           'usage': {'input_tokens': 10, 'output_tokens': 5}}


def stream_events(text='hello', usage=(10, 5)):
    """The events of one streamed message, as the API sends them."""
    start = {**MESSAGE, 'content': [], 'stop_reason': None,
             'usage': {'input_tokens': usage[0], 'output_tokens': 1}}
    return [
        {'type': 'message_start', 'message': start},
        {'type': 'ping'},
        {'type': 'content_block_start', 'index': 0, 'content_block': {'type': 'text', 'text': ''}},
        *({'type': 'content_block_delta', 'index': 0,
           'delta': {'type': 'text_delta', 'text': part}} for part in re.findall('..?', text)),
        {'type': 'content_block_stop', 'index': 0},
        {'type': 'message_delta', 'delta': {'stop_reason': 'end_turn', 'stop_sequence': None},
         'usage': {'output_tokens': usage[1]}},
        {'type': 'message_stop'}]


def stream_bytes(events=None, newline=b'\n'):
    data = b''.join(cf.event_bytes(event)
                    for event in (stream_events() if events is None else events))
    return data.replace(b'\n', newline)


CHAT_USAGE = {'prompt_tokens': 30, 'completion_tokens': 7,
              'prompt_tokens_details': {'cached_tokens': 20},
              'completion_tokens_details': {'reasoning_tokens': 2}}
USAGE = {'input_tokens': 10, 'cache_creation_input_tokens': 0, 'cache_read_input_tokens': 20,
         'output_tokens': 7, 'output_tokens_details': {'thinking_tokens': 2}}


def chat_chunk(delta, finish=None, **fields):
    return {'id': 'chatcmpl-1', 'object': 'chat.completion.chunk', 'model': 'gpt-5.4-2026-03-05',
            'choices': [{'index': 0, 'delta': delta, 'finish_reason': finish}], **fields}


def chat_stream(*deltas, finish='stop', usage=CHAT_USAGE, is_done=True):
    """A Chat Completions stream of these deltas, as bytes."""
    chunks = [chat_chunk({'role': 'assistant', 'content': ''}), *map(chat_chunk, deltas)]
    chunks += [chat_chunk({}, finish)] if finish else []
    chunks += [{'choices': [], 'usage': usage}] if usage else []
    lines = [json.dumps(chunk) for chunk in chunks] + (['[DONE]'] if is_done else [])
    return ''.join(f'data: {line}\n\n' for line in lines).encode()


def call_delta(index, id=None, name=None, arguments=''):
    function = {'name': name, 'arguments': arguments} if name else {'arguments': arguments}
    return {'tool_calls': [{'index': index, **({'id': id, 'type': 'function'} if id else {}),
                            'function': function}]}


def responses_stream(*events):
    """A Responses stream of these events, as bytes."""
    return ''.join(f'event: {event["type"]}\ndata: {json.dumps(event)}\n\n'
                   for event in events).encode()


RESPONSES_USAGE = {'input_tokens': 30, 'output_tokens': 7,
                   'input_tokens_details': {'cached_tokens': 20},
                   'output_tokens_details': {'reasoning_tokens': 2}}


def completed(*output, **fields):
    return {'type': 'response.completed', 'response': {
        'status': 'completed', 'output': list(output), 'usage': RESPONSES_USAGE, **fields}}


def text_delta(text, index=0):
    return {'type': 'response.output_text.delta', 'output_index': index, 'delta': text}


CHAT_HELLO = {'id': 'chatcmpl-1', 'object': 'chat.completion',
              'choices': [{'index': 0, 'message': {'role': 'assistant', 'content': 'hello'},
                           'finish_reason': 'stop'}], 'usage': CHAT_USAGE}


def openai_refusal(status, code, message='no', **fields):
    fields = {name.replace('_', '-'): value for name, value in fields.items()}
    return Play(status, fields,
                {'error': {'message': message, 'type': 'x', 'code': code, 'param': None}})


def compressed(data):
    """[(content-encoding, bytes), ...]: how these bytes may come compressed, or said to be."""
    raw = zlib.compressobj(wbits=-15)
    raw = raw.compress(data) + raw.flush()
    half = len(data) // 2
    return [('gzip', gzip.compress(data)), ('GZIP', gzip.compress(data)),
            ('x-gzip', gzip.compress(data)), ('deflate', zlib.compress(data)),
            ('Deflate', raw), ('gzip, deflate', zlib.compress(gzip.compress(data))),
            ('deflate,gzip', gzip.compress(raw)),
            ('gzip', gzip.compress(data[:half]) + gzip.compress(data[half:])), ('gzip', data),
            ('gzip', zlib.compress(data)),
            ('deflate', gzip.compress(data)), ('identity, gzip', gzip.compress(data)),
            ('identity', data), ('none', data), ('UTF-8', data), ('', data)]


OVERLOADED_EVENT = {'type': 'error',
                    'error': {'type': 'overloaded_error', 'message': 'Overloaded'}}


def pieces(data, size):
    return [data[i:i + size] for i in range(0, len(data), size)]


class Play:
    """One scripted answer: status, header fields, and the body in pieces.  An exception among
    the pieces, or as the whole, is raised there; `answered` is set at the first read."""

    def __init__(self, status=200, fields=None, body=MESSAGE, stream=None):
        self.status = status
        self.headers = {'content-type': 'application/json', **(fields or {})}
        if stream is not None:
            self.headers['content-type'] = 'text/event-stream'
            self.pieces = stream if isinstance(stream, list) else [stream]
        else:
            self.pieces = [body if isinstance(body, bytes) else json.dumps(body).encode()]


def refusal(status, type, message, **fields):
    fields = {name.replace('_', '-'): value for name, value in fields.items()}
    return Play(status, fields, api_error(type, message))


SILENCE = object()            # among the pieces: nothing comes for a while


class FakeUpstreamResponse:
    def __init__(self, play, clock=None):
        self._clock = clock
        self.status, self.headers = play.status, play.headers
        self.fields = [field for field in play.headers.items()
                       if cf.goes_to_client(field[0].lower())]
        self.forwarded_head = ''.join(f'{name}: {value}\r\n' for name, value in self.fields)
        self.length = None
        self._pieces = list(play.pieces)
        self.is_closed = False
        self.idle_s = None

    def close(self):
        self.is_closed = True

    def limit_silence(self, seconds):
        self.idle_s = seconds

    def wait(self, seconds):
        is_silent = self._pieces[:1] == [SILENCE]
        del self._pieces[:is_silent]
        if is_silent and self._clock:
            self._clock.now += seconds
        return not is_silent

    def read(self):
        while not self.wait(0):
            pass
        piece = self._pieces.pop(0) if self._pieces else b''
        if isinstance(piece, BaseException):
            raise piece
        return piece

    def has_received(self):
        return False

    def read_all(self, limit):
        body = b''
        while len(body) < limit:
            piece = self.read()
            if not piece:
                break
            body += piece
        return body


class FakeUpstream:
    """Plays a script instead of the network: {'a': [Play, ...], ...}; the last one repeats.

    `seen` lists what was sent: (key id, model); `sent` the UpstreamRequests."""

    def __init__(self, **script):
        self.script = {key: list(plays if isinstance(plays, list) else [plays])
                       for key, plays in script.items()}
        self.seen, self.sent, self.opened, self.first_byte_s = [], [], [], []
        self.clock = None             # moved by silence

    def open(self, wanted, exchange, first_byte_s, wait=None):
        head = wanted.head.decode()
        token = re.search(r'sk-(?:ant-\w+|proj)-(\w+)|Bearer (eyJ)', head)
        key = token.group(1) or 'login' if token else 'client'
        body = json.loads(wanted.body) if wanted.body else {}
        self.seen.append((key, body.get('model')))
        self.sent.append(wanted)
        self.first_byte_s.append(first_byte_s)
        plays = self.script[key]
        play = plays.pop(0) if len(plays) > 1 else plays[0]
        if callable(play):
            play = play(body)
        if isinstance(play, BaseException):
            raise play
        self.opened.append(FakeUpstreamResponse(play, self.clock))
        if wait:
            wait(self.opened[-1])
        return self.opened[-1]


class FakeConnection:
    """Keeps what is sent to the client."""

    def __init__(self):
        self.data = b''
        self.breaks = False

    def send(self, data):
        if self.breaks:
            raise cf.ClientGone
        self.data += data


class Answered:
    """An HTTP answer, taken apart."""

    def __init__(self, data):
        head, _, rest = data.partition(b'\r\n\r\n')
        first, *lines = head.decode('latin-1').split('\r\n')
        self.status = int(first.split()[1])
        self.fields = [tuple(line.split(': ', 1)) for line in lines]
        self.headers = {name.lower(): value for name, value in self.fields}
        self.is_complete = True
        self.body = self._dechunk(rest) if 'transfer-encoding' in self.headers else rest

    def _dechunk(self, data):
        body = b''
        self.is_complete = False
        while data:
            size, _, data = data.partition(b'\r\n')
            count = int(size, 16)
            if not count:
                self.is_complete = True
                break
            body, data = body + data[:count], data[count + 2:]
        return body

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        return self.json['error']

    @property
    def events(self):
        return read_events(self.body)


def make_head(method, target, fields=()):
    """The cf.RequestHead of a request."""
    lines = [f'{method} {target} HTTP/1.1', *(f'{name}: {value}' for name, value in fields)]
    return cf.parse_head('\r\n'.join(lines).encode())


def request_bytes(method='POST', target=cf.MESSAGES_PATH, body=None, **fields):
    """A request as a client sends it.  A body brings its type and length along, and goes as JSON
    unless it is bytes; a field that is None stays out."""
    lines = {'host': 'localhost'}
    if body is not None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines.update({'content-type': 'application/json', 'content-length': len(body)})
    lines.update({name.replace('_', '-'): value for name, value in fields.items()})
    head = ''.join(f'{name}: {value}\r\n' for name, value in lines.items() if value is not None)
    return f'{method} {target} HTTP/1.1\r\n{head}\r\n'.encode() + (body or b'')


def read_all(sock):
    """What comes until the other side closes."""
    return b''.join(iter(lambda: sock.recv(65536), b''))


def connect(port):
    return socket.create_connection(('127.0.0.1', port), timeout=PATIENCE_S)


def read_events(data):
    """[{'type': ...}, ...]; fails on an event that is not whole or whose name differs."""
    events = []
    for block in re.split(rb'\r?\n\r?\n', data):
        if block.strip():
            name, _, value = block.replace(b'\r', b'').partition(b'\ndata: ')
            event = json.loads(value)
            assert name == b'event: ' + event['type'].encode(), block
            events.append(event)
    return events


Done = namedtuple('Done', 'returncode stdout stderr')


def run_process(*arguments, stdin='', **environ):
    """What a command says and returns, run as a user runs it."""
    done = subprocess.run([sys.executable, SCRIPT, *arguments], input=stdin, capture_output=True,
                          encoding='utf-8', env={**os.environ, **environ}, timeout=60)
    return Done(done.returncode, done.stdout, done.stderr)


def run_command(*arguments, stdin='', **environ):
    """The same by main() in this process; but `start` and `restart` get one of their own, since
    they take it over."""
    if {'start', 'restart'} & {*arguments}:
        return run_process(*arguments, stdin=stdin, **environ)
    output, errors = streams = [io.TextIOWrapper(io.BytesIO(), 'utf-8') for _ in range(2)]
    cf.complain_once.cache_clear()
    with mock.patch.dict(os.environ, environ), mock.patch('signal.signal'), \
            warnings.catch_warnings(), mock.patch.multiple(cf, RUN=f'python3 {SCRIPT}',
                                                           hide_values_of_crashes=mock.DEFAULT), \
            mock.patch.multiple(sys, stdin=io.StringIO(stdin), stdout=output, stderr=errors):
        warnings.simplefilter('ignore')           # as outside of tests
        try:
            status = cf.main(arguments)
        except SystemExit as end:     # argparse
            status = end.code or 0
        for stream in streams:
            stream.flush()
    return Done(status, *(stream.buffer.getvalue().decode() for stream in streams))


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as sock:
        return sock.getsockname()[1]


def has_ipv6():
    try:
        socket.create_server(('::1', 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def needs(path):
    return unittest.skipUnless(os.path.exists(path), f'{path} is not installed')


class ScratchTest(unittest.TestCase):
    """A test with a folder of its own, which is also HOME."""

    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix='failover-test-')
        self.addCleanup(shutil.rmtree, self.folder)
        self.path = os.path.join(self.folder, 'config', 'config.json')
        environ = {'HOME': self.folder, 'PATH': os.environ['PATH']}
        patch = mock.patch.dict(os.environ, environ, clear=True)
        patch.start()
        self.addCleanup(patch.stop)

    def write_config(self, document):
        os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
        text = document if isinstance(document, str) else json.dumps(document)
        with open(self.path, 'w', encoding='utf-8') as file:
            file.write(text)
        os.chmod(self.path, 0o600)

    def read_config(self):
        with open(self.path, encoding='utf-8') as file:
            return json.load(file)


# ==============================================================================
# Small tools
# ==============================================================================

class SmallToolsTest(ScratchTest):
    def test_a_masked_token_shows_its_kind_and_last_four_characters_only(self):
        for token, shown in ((token_of('a'), 'sk-ant-api...cdef'),
                             ('sk-ant-oat01-' + 'x' * 40, 'sk-ant-oat...xxxx'),
                             ('sk-ant-api03-short', 'sk-ant-api...'), ('secret', '...'),
                             ('', '...'),
                             ('env:MY_KEY', 'env:MY_KEY'), ('file:~/.key', 'file:~/.key')):
            with self.subTest(token=token):
                self.assertEqual(cf.mask_token(token), shown)

    def test_durations_read_as_a_person_says_them(self):
        for seconds, text in ((0, '0 s'), (45.4, '45 s'), (99, '99 s'), (120, '2 min'),
                              (3600, '60 min'), (7200, '2 h'), (11100, '3 h 5 min'),
                              (200_000, '2 d 7 h'), (-5, '0 s')):
            self.assertEqual(cf.format_duration(seconds), text)

    def test_the_reason_of_an_error_never_quotes_what_was_sent(self):
        secret = token_of('a')
        for error in (ValueError(f"Invalid header value b'{secret}'"), OSError(secret),
                      http.client.BadStatusLine(secret),
                      ConnectionResetError(104, 'Connection reset')):
            self.assertNotIn('api03', cf.error_reason(error))

    def test_a_text_without_a_mark_of_a_token_holds_none(self):
        for token in (token_of('a'), openai_token_of('a'), make_login(),
                      *(f'{mark}{"x" * 20}' for mark in cf.SECRET_MARKS)):
            self.assertNotIn(token, cf.redact(f'before {token} after'))
        for text in ('a plain text', 'desk-macbook-air', 'the task-runner2 of disk-cleanup-tool'):
            self.assertEqual(cf.redact(text), text)
        for before in ('\\n', '%3d', 'token=', 'Bearer'):
            self.assertNotIn(token_of('a')[-12:], cf.redact(f'{before}{token_of("a")}'))

    def test_control_characters_become_visible_not_active(self):
        self.assertNotIn('\x1b', cf.printable('\x1b[31mred\r\nx'))
        self.assertEqual(cf.header_text('naïve\r\nx-evil: 1'), 'na?ve??x-evil: 1')

    def test_odd_json_is_a_value_error(self):
        for data in ('[1]', 'nonsense', '[' * 100_000, b'\xff', '"text"', '1' * 5000):
            with self.subTest(data=data[:20]), self.assertRaises(ValueError):
                cf.loads_object(data)

    def test_a_write_is_private_and_follows_a_symbolic_link(self):
        real, link = (os.path.join(self.folder, 'dotfiles.json'),
                      os.path.join(self.folder, 'link.json'))
        with open(real, 'w') as file:
            file.write('old')
        os.symlink(real, link)
        cf.write_atomically(link, b'new')
        self.assertTrue(os.path.islink(link))
        with open(real) as file:
            self.assertEqual(file.read(), 'new')
        self.assertEqual(stat.S_IMODE(os.stat(real).st_mode), 0o600)

    def test_a_write_follows_nothing_that_stands_where_its_temporary_file_goes(self):
        path, other = os.path.join(self.folder, 'file'), os.path.join(self.folder, 'other')
        cf.write_atomically(path, b'old')
        os.symlink(other, f'{path}.{os.getpid()}.{threading.get_ident()}.tmp')
        with self.assertRaises(FileExistsError):
            cf.write_atomically(path, b'secret')
        self.assertFalse(os.path.exists(other))
        with open(path) as file:
            self.assertEqual(file.read(), 'old')

    def test_a_failed_write_leaves_the_old_file_and_no_litter(self):
        path = os.path.join(self.folder, 'file')
        cf.write_atomically(path, b'old')
        with mock.patch('os.fsync', side_effect=OSError(28, 'No space left on device')):
            with self.assertRaises(OSError):
                cf.write_atomically(path, b'new')
        with open(path) as file:
            self.assertEqual(file.read(), 'old')
        self.assertEqual(os.listdir(self.folder), ['file'])


# ==============================================================================
# Configuration
# ==============================================================================

#: As the Node program of the same name writes it.
NODE_DOCUMENT = {
    'profiles': {
        'default': {'port': 4080, 'keyOrder': ['personal', 'work'], 'openaiKeyOrder': ['oa'],
                    'priorityOrder': ['anthropic:work', 'openai:oa', 'anthropic:personal']},
        'second': {'port': 4081, 'keyOrder': []}},
    'keys': {'personal': {'token': token_of('personal'), 'label': 'Personal', 'type': 'api-key',
                          'addedAt': '2026-01-01T00:00:00.000Z'},
             'work': {'token': 'sk-ant-oat01-' + 'w' * 40, 'label': 'Work', 'type': 'oauth',
                      'addedAt': '2026-01-01T00:00:00.000Z'}},
    'openaiKeys': {'oa': {'token': 'sk-proj-' + 'o' * 40, 'label': 'OA', 'type': 'api_key',
                          'addedAt': '2026-01-01T00:00:00.000Z'}},
    'openaiModelFallback': True, 'openaiModelMapping': {'claude-opus-4-6': 'gpt-5.4'},
    'modelFallback': {'claude-opus-4-6': 'claude-sonnet-4-6'},
    'cooldownMs': 60000, 'queueWaitMs': 90000, 'logLevel': 'info', 'maxLogSize': 5242880}


class ConfigurationTest(unittest.TestCase):
    def test_a_file_of_the_node_program_loads_as_it_is(self):
        config = cf.parse_config(NODE_DOCUMENT)
        self.assertEqual(config.profiles['default'].order,
                         ('anthropic:work', 'openai:oa', 'anthropic:personal'))
        self.assertEqual(config.profiles['second'].order,
                         ('anthropic:personal', 'anthropic:work', 'openai:oa'))
        self.assertTrue(config.keys['anthropic:work'].oauth)
        self.assertFalse(config.keys['anthropic:personal'].oauth)
        self.assertEqual((config.cooldown_ms, config.model_fallback),
                         (60000, {'claude-opus-4-6': 'claude-sonnet-4-6'}))
        self.assertEqual(json.loads(cf.dump_config(config)), NODE_DOCUMENT)

    def test_claude_keys_that_no_order_names_still_come_before_openais(self):
        document = make_document('a', 'b', **with_openai('oa', 'ob'))
        document['profiles']['default'] = {'port': 0, 'keyOrder': ['b'], 'openaiKeyOrder': ['ob']}
        self.assertEqual(cf.parse_config(document).profiles['default'].order,
                         ('anthropic:b', 'anthropic:a', 'openai:ob', 'openai:oa'))

    def test_an_empty_document_gives_the_defaults(self):
        config = cf.parse_config({})
        self.assertEqual(config.profiles, {'default': cf.Profile('default', 4080, ())})
        for setting in cf.SETTINGS:
            self.assertEqual(getattr(config, cf.attribute_name(setting.name)), setting.default)

    def test_null_is_the_default_and_a_users_map_replaces_the_default_whole(self):
        config = cf.parse_config({'queueWaitMs': None, 'modelFallback': {}})
        self.assertEqual((config.queue_wait_ms, config.model_fallback), (90000, {}))

    def test_every_wrong_value_is_named_with_what_it_must_be(self):
        key = {'token': token_of('a')}
        for document, *words in (
                ([], 'JSON object'),
                ({'profiles': []}, 'profiles must be an object'),
                ({'profiles': {'x': 4080}}, 'profiles.x must be an object'),
                ({'profiles': {'x': {'port': '4080'}}}, 'profiles.x.port', 'without quotes',
                 '"4080"'),
                ({'profiles': {'x': {'port': 70000}}}, 'profiles.x.port', '65535'),
                ({'profiles': {'x': {'port': True}}}, 'profiles.x.port'),
                ({'profiles': {'x': {}}}, 'profiles.x.port', 'null'),
                ({'profiles': {'x': {'port': 1}, 'y': {'port': 1}}}, 'profiles.y.port',
                 'profile x'),
                ({'profiles': {'x\n': {'port': 1}}}, 'name'),
                ({'profiles': {'x': {'port': 1, 'keyOrder': ['gone']}}}, 'profiles.x.keyOrder',
                 "'gone'"),
                ({'profiles': {'x': {'port': 1, 'keyOrder': 'a'}}}, 'profiles.x.keyOrder', 'list'),
                ({'profiles': {'x': {'port': 1, 'priorityOrder': ['a']}}, 'keys': {'a': key}},
                 'profiles.x.priorityOrder', "'a'", 'write "anthropic:a"'),
                ({'keys': {'a': {}}}, 'keys.a has no token', 'out of the file'),
                ({'keys': {'a': {'token': 'env:'}}}, 'keys.a.token', 'env:NAME'),
                ({'keys': {'a': {'token': 'file:here'}}}, 'keys.a.token', 'file:~/path'),
                ({'keys': {'a': {**key, 'type': 'OAuth'}}}, 'keys.a.type', 'oauth'),
                ({'keys': {'a': {**key, 'label': 5}}}, 'keys.a.label must be a text'),
                ({'openaiKeys': {'a': {**key, 'api': 'chat'}}}, 'openaiKeys.a.api', 'responses'),
                ({'openaiKeys': {'a': {**key, 'modelMapping': ['x']}}},
                 'openaiKeys.a.modelMapping', 'model names'),
                ({'profiles': {'x': {'port': 1, 'openaiModelMapping': {'a*b': 'x'}}}},
                 'profiles.x.openaiModelMapping', 'only at the end'),
                ({'keys': {'a': {'token': ' '}}}, 'keys.a has no token'),
                ({'keys': {'a': {'token': 'sk-ant- x'}}}, 'keys.a.token', 'copy it again'),
                ({'keys': {'a': 'sk-ant-api03-x'}}, 'keys.a must be an object'),
                ({'keys': {'a b': key}}, "keys.a b: a key's id"),
                ({'keys': {'a': {**key, 'label': 5}}}, 'keys.a.label'),
                ({'keys': {'a': {**key, 'baseUrl': 'ftp://x'}}}, 'keys.a.baseUrl'),
                ({'openaiKeys': {'o': {}}}, 'openaiKeys.o has no token'),
                ({'queueWaitMs': '90s'}, 'queueWaitMs', 'milliseconds', '"90s"'),
                ({'queueWaitMs': -1}, 'queueWaitMs', '0 or more'),
                ({'cooldownMs': 1.5}, 'cooldownMs'),
                ({'maxLogSize': 1}, 'maxLogSize', '4096'),
                ({'logLevel': 'loud'}, 'logLevel', 'debug, info, warn, error'),
                ({'openaiModelFallback': 'yes'}, 'openaiModelFallback', 'true or false'),
                ({'openaiApi': 'completions'}, 'openaiApi', 'responses'),
                ({'modelFallback': {'a': 1}}, 'modelFallback', 'model names'),
                ({'modelFallback': {'a*b': 'c'}}, 'modelFallback', 'only at the end'),
                ({'anthropicBaseUrl': 'api.anthropic.com'}, 'anthropicBaseUrl', 'https://'),
                ({'anthropicBaseUrl': 'https://u:p@host'}, 'anthropicBaseUrl', 'user name'),
                ({'anthropicBaseUrl': 'http://example.com'}, 'anthropicBaseUrl', 'must use https'),
                ({'anthropicBaseUrl': 'https://host:99999'}, 'anthropicBaseUrl'),
                ({'accessToken': 'two words'}, 'accessToken'),
                ({'firstByteMs': 999}, 'firstByteMs', '1000 or more'),
                ({'allowedHosts': 'x'}, 'allowedHosts', 'list'),
                ({'allowedOrigins': [1]}, 'allowedOrigins', 'list')):
            with self.subTest(document=document):
                with self.assertRaises(cf.ConfigError) as caught:
                    cf.parse_config(document)
                for word in words:
                    self.assertIn(word, str(caught.exception))

    def test_no_message_and_no_repr_shows_a_token(self):
        secret = 'sk-ant-api03-very secret'
        with self.assertRaises(cf.ConfigError) as caught:
            cf.parse_config({'keys': {'a': {'token': secret}}})
        self.assertNotIn('secret', str(caught.exception))
        with self.assertRaises(cf.ConfigError) as caught:
            cf.parse_config({'accessToken': 'my secret'})
        self.assertNotIn('secret', str(caught.exception))
        config = make_config('a')
        self.assertNotIn('0123', repr(config) + repr(config.keys))
        for document in ({'profiles': {'x': {'port': 1, 'keyOrder': [token_of('a')]}}},
                         {'anthropicBaseUrl': 'https://u:0123456789@h'},
                         {'openaiBaseUrl': 'ftp://h?key=0123456789'}):
            with self.assertRaises(cf.ConfigError) as caught:
                cf.parse_config(document)
            self.assertNotIn('0123456789', str(caught.exception))

    def test_fields_that_are_not_known_are_named(self):
        document = make_document('a', queueWaitMS=1)
        document['profiles']['default']['keyorder'] = []
        document['keys']['a']['note'] = 'x'
        self.assertEqual(cf.unknown_fields(cf.parse_config(document)),
                         ['queueWaitMS', 'profiles.default.keyorder', 'keys.a.note'])
        self.assertEqual(cf.unknown_fields(cf.parse_config(NODE_DOCUMENT)), [])

    def test_plain_http_is_for_near_hosts(self):
        for url in ('http://localhost:8000', 'http://127.0.0.1', 'http://[::1]:80',
                    'http://192.168.1.5/v1', 'http://gpu-box:8000',
                    'http://host.docker.internal:11434', 'https://example.com/x'):
            self.assertIsNone(cf.check_base_url(url), url)
        self.assertIn('https', cf.check_base_url('http://93.184.216.34'))

    def test_the_config_has_a_field_for_every_setting(self):
        names = {cf.attribute_name(setting.name) for setting in cf.SETTINGS}
        self.assertEqual(set(cf.Config._fields),
                         names | {'document', 'profiles', 'keys', 'has_other_providers'})


# ==============================================================================
# Configuration edits
# ==============================================================================

class ConfigurationEditsTest(unittest.TestCase):
    def add(self, config, token=None, label='', **options):
        return cf.add_key(config, cf.ANTHROPIC, token or token_of('new'), label, 'now', **options)

    def test_a_new_key_follows_the_others_in_every_profile(self):
        config, key = self.add(cf.parse_config(NODE_DOCUMENT), label='My New Key!')
        self.assertEqual((key.id, key.label), ('my-new-key', 'My New Key!'))
        self.assertEqual(config.profiles['default'].order[-1], 'anthropic:my-new-key')
        self.assertEqual(config.document['profiles']['default']['keyOrder'][-1], 'my-new-key')

    def test_a_new_key_never_comes_before_one_that_no_order_names(self):
        document = make_document('a', 'b')
        document['profiles'] = {'default': {'port': 0, 'keyOrder': ['b']},
                                'other': {'port': 0, 'priorityOrder': ['client', 'anthropic:b']}}
        config, _ = self.add(cf.parse_config(document))
        self.assertEqual(config.profiles['default'].order,
                         ('anthropic:b', 'anthropic:a', 'anthropic:key'))
        self.assertEqual(config.profiles['other'].order,
                         ('client', 'anthropic:b', 'anthropic:a', 'anthropic:key'))

    def test_a_token_is_no_label(self):
        self.assertEqual(self.add(make_config(), label='desk-macbook-air')[1].label,
                         'desk-macbook-air')
        with self.assertRaisesRegex(cf.ConfigError, 'label looks like a token'):
            self.add(make_config(), 'mine', token_of('a'), base_url='http://localhost:1')
        with self.assertRaises(cf.UnknownKey) as caught:
            cf.remove_key(make_config('a'), token_of('a'))
        self.assertNotIn('0123456789', str(caught.exception))

    def test_unknown_fields_survive_edits(self):
        document = {**NODE_DOCUMENT, 'future': {'x': [1]}}
        document['keys'] = {**document['keys'], 'extra': {'token': token_of('e'), 'note': 'mine'}}
        config, key = self.add(cf.parse_config(document))
        config = cf.remove_key(config, key.id)
        self.assertEqual(config.document['future'], {'x': [1]})
        self.assertEqual(config.document['keys']['extra']['note'], 'mine')

    def test_an_edit_leaves_the_old_config_as_it_was(self):
        config = make_config('a')
        before = json.dumps(config.document)
        self.add(config)
        cf.remove_key(config, 'a')
        self.assertEqual(json.dumps(config.document), before)

    def test_ids_are_free_and_speakable(self):
        config = make_config()
        for label, id in (('', 'key'), ('', 'key-2'), ('Ünïcode', 'n-code'), ('日本', 'key-3')):
            config, key = self.add(
                config, token_of(f'{label}{id}'.encode('ascii', 'replace').hex()), label)
            self.assertEqual(key.id, id)

    def test_the_type_follows_the_token(self):
        _, key = self.add(make_config(), 'sk-ant-oat01-' + 'x' * 40)
        self.assertTrue(key.oauth)

    def test_a_token_that_cannot_be_one_is_refused(self):
        for token, word in (('', 'empty'), ('sk-proj-x', '--base-url'),
                            (token_of('a'), 'already, as key a'), ('sk-ant-a b', 'copy it again')):
            with self.subTest(token=token), self.assertRaisesRegex(cf.ConfigError, word):
                self.add(make_config('a'), token) if token else cf.add_key(
                    make_config(), cf.ANTHROPIC, ' ', '', 'now')

    def test_another_server_takes_any_token(self):
        config, key = self.add(make_config(), 'local-secret', base_url='http://localhost:8000')
        self.assertEqual(key.base_url, 'http://localhost:8000')

    def test_the_first_openai_key_switches_the_fallback_on_and_later_ones_leave_it(self):
        config, key = cf.add_key(make_config('a'), cf.OPENAI, openai_token_of('x'), 'Mine', 'now')
        self.assertEqual((config.openai_model_fallback, key.ref), (True, 'openai:mine'))
        self.assertEqual(config.document['openaiKeys']['mine']['type'], 'api_key')
        self.assertEqual(config.profiles['default'].order, ('anthropic:a', 'openai:mine'))
        off = cf.parse_config({**config.document, 'openaiModelFallback': False})
        config, key = cf.add_key(off, cf.OPENAI, make_login(), 'chatgpt', 'now')
        self.assertEqual((config.openai_model_fallback,
                          config.document['openaiKeys']['chatgpt']['type']),
                         (False, 'oauth_token'))

    def test_a_new_claude_key_comes_before_the_openai_keys_at_the_end(self):
        document = make_document('a', **with_openai('oa'))
        for order, expected in ((['anthropic:a', 'openai:oa'],
                                 ('anthropic:a', 'anthropic:key', 'openai:oa')),
                                (['openai:oa', 'anthropic:a'],
                                 ('openai:oa', 'anthropic:a', 'anthropic:key')),
                                (['openai:oa'], ('openai:oa', 'anthropic:a', 'anthropic:key'))):
            document['profiles']['default'] = {'port': 0, 'priorityOrder': order}
            config, _ = self.add(cf.parse_config(document))
            self.assertEqual(config.profiles['default'].order, expected)

    def test_a_token_of_the_other_provider_is_refused(self):
        with self.assertRaisesRegex(cf.ConfigError, 'add it with add-key'):
            cf.add_key(make_config(), cf.OPENAI, token_of('a'), '', 'now')
        with self.assertRaisesRegex(cf.ConfigError, 'add-openai-key'):
            self.add(make_config(), openai_token_of('x'))
        cf.add_key(make_config(), cf.OPENAI, 'none', 'ollama', 'now', 'http://localhost:11434/v1')

    def test_a_removed_key_leaves_every_order(self):
        config = cf.remove_key(cf.parse_config(NODE_DOCUMENT), 'work')
        self.assertEqual(config.profiles['default'].order, ('openai:oa', 'anthropic:personal'))
        self.assertNotIn('work', json.dumps(config.document['profiles']))
        config = cf.remove_key(config, 'oa')
        self.assertEqual(config.document['openaiKeys'], {})

    def test_an_unknown_or_ambiguous_key_is_named(self):
        with self.assertRaisesRegex(cf.UnknownKey, "'nope'.*list-keys"):
            cf.remove_key(make_config('a'), 'nope')
        both = make_config('a', openaiKeys={'a': {'token': 'sk-x'}})
        with self.assertRaisesRegex(cf.ConfigError, 'anthropic:a or openai:a'):
            cf.remove_key(both, 'a')
        self.assertEqual(list(cf.remove_key(both, 'openai:a').keys), ['anthropic:a'])


# ==============================================================================
# Planning
# ==============================================================================

class PlanningTest(unittest.TestCase):
    def plan(self, config, models=(OPUS,), client=None):
        plan = cf.plan_attempts(config, config.profiles['default'], list(models), client)
        return [(attempt.key.id, attempt.model) for attempt in plan.attempts]

    def test_names_map_exactly_then_by_the_longest_pattern_then_by_the_star(self):
        mapping = {'claude-opus-4-6': 'exact', 'claude-*': 'any-*',
                   'claude-opus-*': 'claude-sonnet-*', '*': 'star'}
        for model, mapped in (('claude-opus-4-6', 'exact'), (OPUS, SONNET), ('claude-x', 'any-x'),
                              ('gpt', 'star')):
            self.assertEqual(cf.map_model(mapping, model), mapped)
        self.assertIsNone(cf.map_model({'claude-opus-*': 'x'}, 'claude-haiku-5'))

    def test_a_chain_is_followed_link_by_link_without_cycles_at_most_five_long(self):
        self.assertEqual(cf.model_chain({'a': 'b', 'b': 'c'}, 'a'), ['a', 'b', 'c'])
        self.assertEqual(cf.model_chain({'a': 'b', 'b': 'a'}, 'a'), ['a', 'b'])
        self.assertEqual(cf.model_chain({'*': '*x'}, 'a'), ['a', 'ax', 'axx', 'axxx', 'axxxx'])
        self.assertEqual(cf.model_chain(cf.parse_config({}).model_fallback, OPUS), [OPUS, SONNET])

    def test_all_keys_for_a_model_come_before_the_next_model(self):
        self.assertEqual(self.plan(make_config('a', 'b'), (OPUS, SONNET, HAIKU)),
                         [(key, model) for model in (OPUS, SONNET, HAIKU) for key in 'ab'])

    def test_the_clients_own_credential_stands_where_the_order_puts_it(self):
        client = cf.Key('client:1', 'client', cf.ANTHROPIC, '', 'client')
        config = make_config('a', profiles={
            'default': {'port': 0, 'priorityOrder': ['client', 'anthropic:a']}})
        self.assertEqual(self.plan(config, client=client), [('client', OPUS), ('a', OPUS)])
        self.assertEqual(self.plan(config), [('a', OPUS)])

    def test_without_any_key_the_clients_own_credential_is_used(self):
        client = cf.Key('client:1', 'client', cf.ANTHROPIC, '', 'client')
        self.assertEqual(self.plan(make_config(), client=client), [('client', OPUS)])
        self.assertEqual(self.plan(make_config('a'), client=client), [('a', OPUS)])
        self.assertEqual(self.plan(make_config()), [])
        for config, uses in ((make_config(), True), (make_config('a'), False),
                             (make_config(openaiKeys={'o': {'token': 'sk-x'}}), True)):
            self.assertEqual(cf.uses_clients_own(config, config.profiles['default']), uses)

    def openai_plan(self, *keys, models=(OPUS, SONNET), order=None, **changes):
        """(attempts, last resort) of a configuration with OpenAI keys 'oa' and 'ob'."""
        document = make_document(*keys, **with_openai('oa', 'ob', **changes))
        if order:
            document['profiles']['default'] = {'port': 0, 'priorityOrder': order}
        config = cf.parse_config(document)
        plan = cf.plan_attempts(config, config.profiles['default'], list(models), None)
        return [[(a.key.id, a.model) for a in attempts] for attempts in plan]

    def test_openai_keys_behind_the_claude_keys_are_the_last_resort(self):
        self.assertEqual(self.openai_plan('a', 'b'),
                         [[('a', OPUS), ('b', OPUS), ('a', SONNET), ('b', SONNET)],
                          [('oa', 'gpt-5.4'), ('ob', 'gpt-5.4')]])

    def test_an_openai_key_before_a_claude_key_is_tried_at_its_place_for_the_requested_model(self):
        order = ['anthropic:a', 'openai:oa', 'anthropic:b']
        self.assertEqual(self.openai_plan('a', 'b', order=order), [
            [('a', OPUS), ('oa', 'gpt-5.4'), ('b', OPUS), ('a', SONNET), ('b', SONNET)],
            [('ob', 'gpt-5.4')]])

    def test_without_a_claude_key_the_openai_keys_are_what_there_is(self):
        self.assertEqual(self.openai_plan(), [[('oa', 'gpt-5.4'), ('ob', 'gpt-5.4')], []])

    def test_openai_keys_are_left_out_while_their_fallback_is_off(self):
        self.assertEqual(self.openai_plan('a', models=(OPUS,), openaiModelFallback=False),
                         [[('a', OPUS)], []])
        config = make_config(openaiModelFallback=False, openaiKeys={'o': {'token': 'sk-x'}})
        self.assertEqual(cf.plan_attempts(config, config.profiles['default'], [OPUS], None),
                         cf.Plan([], []))

    def test_a_keys_mapping_wins_over_the_profiles_and_that_over_the_general_one(self):
        document = make_document(
            **with_openai('oa', openaiModelMapping={'claude-opus-*': 'general', '*': 'rest'}))
        document['profiles']['default']['openaiModelMapping'] = {'claude-opus-*': 'profile',
                                                                 'claude-haiku-*': 'small'}
        document['openaiKeys']['oa']['modelMapping'] = {OPUS: 'key'}
        config = cf.parse_config(document)
        for model, mapped in ((OPUS, 'key'), ('claude-opus-4-6', 'profile'),
                              ('claude-haiku-5', 'small'),
                              (SONNET, 'rest'), ('gpt-5.4-mini', 'gpt-5.4-mini'), ('o3', 'o3')):
            self.assertEqual(cf.map_to_openai(config, config.profiles['default'],
                                              config.keys['openai:oa'], model), mapped)
        bare = make_config(**with_openai('oa', openaiModelMapping={}))
        self.assertEqual(cf.map_to_openai(bare, bare.profiles['default'], bare.keys['openai:oa'],
                                          OPUS), OPUS)


# ==============================================================================
# Request bodies
# ==============================================================================

class RequestBodiesTest(unittest.TestCase):
    def test_the_model_is_found_wherever_it_stands(self):
        for data, model in (
                (b'{"model":"claude-x","messages":[]}', 'claude-x'),
                (b' {\n "model" : "claude-x[1m]" , "n": 1}', 'claude-x[1m]'),
                (b'{"max_tokens":1,"model":"claude-x"}', 'claude-x'),
                (b'{"messages":[{"model":"no"}]}', None), (b'{"model":5}', None), (b'[]', None),
                (b'nonsense', None), (b'', None), (b'[' * 100_000, None)):
            with self.subTest(data=data[:40]):
                self.assertEqual(cf.RequestBody(data).model, model)

    def test_another_model_changes_nothing_else(self):
        data = b'{"model" : "claude-x", "text": "model \\u00e9 \xc3\xa9 1.0", "n": 1.0}'
        for body in (data, bytearray(data)):
            self.assertEqual(bytes(cf.RequestBody(body).for_model('y')),
                             data.replace(b'claude-x', b'y'))
        self.assertIs(cf.RequestBody(data).for_model('claude-x'), data)
        late = b'{"n":1,"model":"claude-x"}'
        self.assertEqual(json.loads(cf.RequestBody(late).for_model('y')), {'n': 1, 'model': 'y'})

    def test_a_stream_is_what_the_top_level_field_says(self):
        nested = b'{"model":"x","messages":[{"input":{"stream":true}}]}'
        for data, streamed in ((b'{"model":"x","stream":true}', True),
                               (b'{"model":"x","stream": false}', False),
                               (nested, False), (b'{"model":"x"}', False)):
            self.assertEqual(cf.RequestBody(data).is_streamed, streamed)

    def test_thinking_that_nobody_signed_is_dropped_and_signed_thinking_stays(self):
        signed = {'type': 'thinking', 'thinking': 'a', 'signature': 'sig'}
        unsigned = {'type': 'thinking', 'thinking': 'b', 'signature': ''}
        text = {'type': 'text', 'text': 'c'}
        body = messages_body(messages=[{'role': 'assistant', 'content': [signed, unsigned, text]},
                                       {'role': 'user', 'content': 'x'},
                                       {'role': 'assistant', 'content': [unsigned]}])
        left = json.loads(cf.drop_unsigned_thinking(json.dumps(body).encode()))
        self.assertEqual(left['messages'], [{'role': 'assistant', 'content': [signed, text]},
                                            {'role': 'user', 'content': 'x'}])
        data = json.dumps(messages_body(messages=body['messages'][1:2])).encode()
        self.assertIs(cf.drop_unsigned_thinking(data), data)

    def test_thinking_of_an_openai_answer_never_goes_to_claude(self):
        ours = [{'type': 'thinking', 'thinking': 'x', 'signature': 'cfo0:'},
                {'type': 'thinking', 'thinking': '', 'signature': 'cfo1:gAAA'},
                {'type': 'redacted_thinking', 'data': 'cfo1:gAAA'}]
        theirs = [{'type': 'thinking', 'thinking': 'a', 'signature': 'sig'},
                  {'type': 'redacted_thinking', 'data': 'op'}]
        for separators in ((',', ':'), (', ', ': ')):
            for block in ours:
                body = messages_body(messages=[{'role': 'assistant', 'content': [*theirs, block]}])
                left = json.loads(
                    cf.drop_unsigned_thinking(json.dumps(body, separators=separators).encode()))
                self.assertEqual(left['messages'][0]['content'], theirs)
        quoted = json.dumps(messages_body(messages=[{'role': 'assistant', 'content': [
            *theirs, {'type': 'text', 'text': 'the mark "cfo1:gAAA" in a text'}]}])).encode()
        self.assertIs(cf.drop_unsigned_thinking(quoted), quoted)

    def test_each_complaint_of_an_openai_server_has_its_repair(self):
        body = {'model': 'm', 'messages': [{'role': 'user', 'content': 'x', 'extra': 'n'}],
                'max_completion_tokens': 128000, 'reasoning_effort': 'xhigh', 'temperature': 1,
                'stop': ['x'], 'parallel_tool_calls': False,
                'tools': [{'type': 'function',
                           'function': {'name': 't', 'description': 'd' * 2000, 'strict': True}}]}
        gone = object()
        for message, field, value in (
                ("Unsupported parameter: 'stop' is not supported with this model.", 'stop', gone),
                ("Unsupported value: 'temperature' does not support 0.5 with this model.",
                 'temperature', gone), ('Unrecognized request argument supplied: reasoning_effort',
                                        'reasoning_effort', gone),
                ("Unknown parameter: 'parallel_tool_calls'.", 'parallel_tool_calls', gone),
                ('stop: Extra inputs are not permitted', 'stop', gone),
                ("property 'stop' is unsupported", 'stop', gone),
                ('Model grok does not support parameter stop.', 'stop', gone),
                ('Unknown name "stop": Cannot find field.', 'stop', gone),
                ('`temperature` and `stop` cannot both be specified for this model.', 'stop',
                 gone), ('Validation: `temperature` is immutable for this model and must be 0.95',
                         'temperature', gone),
                ('`max_completion_tokens` must be less than or equal to `40960`, the maximum '
                 'value', 'max_completion_tokens', 40960),
                ('InternalError.Algo.InvalidParameter: Range of max_tokens should be [1, 65536]',
                 'max_completion_tokens', 65536),
                ('Failed to deserialize the JSON body: unknown field `stop`, expected one of '
                 '`model`', 'stop', gone), ("Unknown parameter: 'messages[0].extra'.", 'messages',
                                            [{'role': 'user', 'content': 'x'}]),
                ("Unknown parameter: 'tools[0].function.strict'.", 'tools',
                 [{'type': 'function', 'function': {'name': 't', 'description': 'd' * 2000}}]),
                ("Unsupported value: 'reasoning_effort' does not support 'xhigh' with this model. "
                 "Supported values are: "
                 "'none', 'low', 'medium', and 'high'.", 'reasoning_effort', 'high'),
                ("Unsupported value: 'reasoning_effort' does not support 'xhigh'. Supported "
                 "values are: 'none'.", 'reasoning_effort', gone),
                ('max_tokens is too large: 128000. This model supports at most 32768 completion '
                 'tokens, whereas you '
                 'provided 128000.', 'max_completion_tokens', 32768),
                ("This model's maximum context length is 8192 tokens. However, you requested "
                 "128100 tokens (100 in the "
                 'messages, 128000 in the completion).', 'max_completion_tokens', 8092),
                ("'max_tokens' is too large: 128000. This model's maximum context length is 8192 "
                 "tokens and your request "
                 'has 100 input tokens', 'max_completion_tokens', 8092),
                ("Invalid 'tools[0].function.description': string too long. Expected a string "
                 "with maximum length 1024, "
                 'but got a string with length 2000 instead.', 'tools',
                 [{'type': 'function',
                   'function': {'name': 't', 'description': 'd' * 1024, 'strict': True}}])):
            with self.subTest(message=message):
                repair = cf.find_openai_repair(message)
                self.assertIsNotNone(repair)
                edited = cf.edit_body(body, [repair], cf.OPENAI_REPAIRS)
                self.assertEqual(edited.get(field, gone), value)
                self.assertEqual({k: v for k, v in edited.items() if k != field},
                                 {k: v for k, v in body.items() if k != field})

    def test_a_server_that_knows_one_name_of_max_tokens_gets_that(self):
        for message, old, new in (
                ('Unrecognized request argument supplied: max_completion_tokens',
                 'max_completion_tokens', 'max_tokens'),
                ("Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                 "'max_completion_tokens' instead.", 'max_tokens', 'max_completion_tokens')):
            repair = cf.find_openai_repair(message)
            self.assertEqual(cf.edit_body({old: 5}, [repair], cf.OPENAI_REPAIRS), {new: 5})

    def test_an_effort_of_the_responses_format_is_lowered_in_its_place(self):
        repair = cf.find_openai_repair(
            "'reasoning.effort' does not support 'max'. Supported values are: 'low', 'medium'.")
        body = {'reasoning': {'effort': 'max', 'summary': 'auto'}}
        self.assertEqual(cf.edit_body(body, [repair], cf.OPENAI_REPAIRS),
                         {'reasoning': {'effort': 'medium', 'summary': 'auto'}})

    def test_what_a_request_is_about_is_never_left_out(self):
        for message in ("Unknown parameter: 'tools'.",
                        "Unsupported parameter: 'messages[0].content'", 'unknown field `model`',
                        "Unknown parameter: 'response_format'.", 'Something else went wrong', '',
                        "This model's maximum context length is 8192 tokens. However, you "
                        "requested 9100 tokens (9000 in "
                        'the messages, 100 in the completion).'):
            self.assertIsNone(cf.find_openai_repair(message), message)

    def test_each_complaint_has_its_repair(self):
        thinking = {'type': 'thinking', 'thinking': 'a', 'signature': 's'}
        body = messages_body(
            thinking={'type': 'adaptive'},
            output_config={'effort': 'high', 'format': 1}, max_tokens=128000,
            context_management={'edits': [{'type': 'clear_thinking_20251015'}, {'type': 'other'}]},
            tools=[{'name': 't', 'defer_loading': True}],
            messages=[{'role': 'assistant', 'content': [thinking, {'type': 'text', 'text': 'x'}]}])
        for message, name, gone, changed in (
                ('messages.1.content.0: Invalid `signature` in `thinking` block', 'signature',
                 '"thinking": "a"', {}),
                ('messages.1.content.0.type: Expected `thinking` or `redacted_thinking`, but '
                 'found `tool_use`.', 'missing_thinking', 'adaptive',
                 {'context_management': {'edits': [{'type': 'other'}]}}),
                ('thinking.type: adaptive is not supported by this model', 'thinking', 'adaptive',
                 {'context_management': {'edits': [{'type': 'other'}]}}),
                ('This model does not support the effort parameter.', 'effort', '"effort"',
                 {'output_config': {'format': 1}}),
                ('output_config: is not supported', 'output_config', 'output_config', {}),
                ('context_management: Extra inputs are not permitted', 'field',
                 'context_management', {}),
                ('tools.0.custom.defer_loading: Extra inputs are not permitted', 'field',
                 'defer_loading', {'tools': [{'name': 't'}]}),
                ('max_tokens: 128000 > 64000, which is the maximum', 'max_tokens', '128000',
                 {'max_tokens': 64000})):
            with self.subTest(message=message):
                repair = cf.find_repair(message)
                self.assertEqual(repair[0], name)
                data, _ = cf.apply_repairs([repair], json.dumps(body).encode(), [])
                repaired = json.loads(data)
                self.assertNotIn(gone, json.dumps(repaired))
                for field, value in changed.items():
                    self.assertEqual(repaired[field], value)

    def test_an_unknown_beta_is_left_out_of_the_header(self):
        repair = cf.find_repair(
            'Unexpected value(s) `effort-2025-11-24` for the `anthropic-beta` header')
        self.assertEqual(repair, ('beta', 'effort-2025-11-24'))
        _, betas = cf.apply_repairs([repair], b'{}',
                                    ['effort-2025-11-24', 'context-1m-2025-08-07'])
        self.assertEqual(betas, ['context-1m-2025-08-07'])

    def test_a_smaller_max_tokens_stays(self):
        data, _ = cf.apply_repairs([('max_tokens', '64000')], b'{"max_tokens":50}', [])
        self.assertEqual(json.loads(data), {'max_tokens': 50})

    def test_a_long_complaint_is_searched_in_no_time(self):
        self.assertIsNone(cf.find_repair('a' * 1_000_000))
        self.assertIsNone(cf.find_repair('a-' * 500_000))

    def test_odd_shapes_break_nothing(self):
        every = [('signature', ''), ('thinking', ''), ('effort', ''), ('max_tokens', '5'),
                 ('field', 'a.0.b')]
        for body in (
                {'messages': 5}, {'messages': [5, {'role': 'assistant', 'content': [5, None]}]},
                {'context_management': {'edits': 5}}, {'context_management': 5, 'thinking': 5},
                {'output_config': 5, 'max_tokens': 'x', 'a': [{'b': 1}]}, {'text': 'half \ud83d'}):
            for repair in every:
                cf.apply_repairs([repair], json.dumps(body).encode(), [])
        data = b'{"messages": 5, "x": {"signature":""}}'
        self.assertIs(cf.drop_unsigned_thinking(data), data)
        half = b'{"text":"\\ud83d","model":"x"}'
        self.assertEqual(json.loads(cf.RequestBody(half).for_model('y')),
                         {'text': '\ud83d', 'model': 'y'})

    def test_what_no_repair_fits_is_left_alone(self):
        self.assertIsNone(cf.find_repair('messages: at least one message is required'))


# ==============================================================================
# Classification
# ==============================================================================

def answer(status, message='', type='', model=OPUS, path=cf.MESSAGES_PATH, is_fallback=False,
           details=None, **headers):
    headers = {name.replace('_', '-'): str(value) for name, value in headers.items()}
    return cf.Answer(status, headers, type, message, START, path, model, is_fallback,
                     details or {})


def unified(window, status, reset_in_s):
    prefix = f'anthropic_ratelimit_unified_{window}_'
    return {prefix + 'status': status, prefix + 'reset': int(START + reset_in_s)}


#: Each row of the policy: (rule, answer, seconds read from it)
POLICY = (
    ('answered', answer(200), None), ('answered', answer(302), None),
    ('relayed', answer(400, 'messages: at least one message is required'), None),
    ('relayed', answer(400, 'prompt is too long: 1200000 tokens > 1000000 maximum'), None),
    ('relayed', answer(413, 'too large', 'request_too_large'), None),
    ('relayed', answer(405), None), ('relayed', answer(409), None), ('relayed', answer(422), None),
    ('relayed', answer(404, 'Not found', 'not_found_error'), None),
    ('relayed', answer(400, 'thinking.type: adaptive is not supported'), None),
    ('relayed', answer(501), None), ('relayed', answer(418), None),
    ('no_credit', answer(400, 'Your credit balance is too low to access the API.'), None),
    ('billing', answer(402, 'payment', 'billing_error'), None),
    ('usage_limit',
     answer(400, 'You have reached your specified API usage limits. You will regain access '
            'on 2023-11-20 at 00:00 UTC.'), 438400 - 0),
    ('usage_limit', answer(400, 'You have reached your specified API usage limits.'), None),
    ('disabled', answer(400, 'This organization has been disabled.'), None),
    ('disabled',
     answer(403, 'OAuth authentication is currently not allowed for this organization.'), None),
    ('bad_thinking', answer(400, 'messages.1.content.0: Invalid `signature` in `thinking` block'),
     None),
    ('bad_thinking', answer(400, 'messages.1: a final `assistant` message must start with a '
                            'thinking block'), None),
    ('unsupported_field',
     answer(400, 'thinking.type: adaptive is not supported', is_fallback=True), None),
    ('unsupported_field', answer(400, 'tags: Extra inputs are not permitted', is_fallback=True),
     None),
    ('auth_failed', answer(401, 'invalid x-api-key', 'authentication_error'), None),
    ('forbidden', answer(403, 'no permission', 'permission_error'), None),
    ('network_refused', answer(403, 'Request not allowed', 'forbidden'), None),
    ('network_refused', answer(403, '<html>Access denied'), None),
    ('network_refused', answer(403), None),
    ('unknown_model', answer(404, f'model: {OPUS}', 'not_found_error'), None),
    ('elsewhere',
     answer(404, 'model not found', 'not_found_error')._replace(path='/v1/files/x/content'), None),
    ('relayed', answer(404, 'not found', 'not_found_error')._replace(path='/v1/complete/x'), None),
    ('window_spent',
     answer(429, **unified('5h', 'rejected', 7200), **unified('7d', 'allowed', 90000)), 7200),
    ('window_spent',
     answer(429, **unified('5h', 'rejected', 7200), **unified('7d', 'rejected', 90000)), 90000),
    ('window_spent', answer(429, anthropic_ratelimit_unified_7d_status='rejected'), None),
    ('window_spent', answer(429, **unified('5h', 'rejected', 7200),
                            **unified('7d_opus', 'rejected', 90000)), 7200),
    ('window_spent', answer(429, **unified('5h', 'rejected', 7200),
                            anthropic_ratelimit_unified_overage_disabled_reason='out_of_credits'),
     7200),
    *(('window_spent', answer(429, anthropic_ratelimit_unified_status='rejected',
                              anthropic_ratelimit_unified_reset=int(START + 60),
                              anthropic_ratelimit_unified_representative_claim=claim), 60)
      for claim in ('five_hour', 'seven_day', 'seven_day_overage_included')),
    ('family_window_spent',
     answer(429, anthropic_ratelimit_unified_status='rejected',
            anthropic_ratelimit_unified_reset=int(START + 60),
            anthropic_ratelimit_unified_representative_claim='seven_day_opus'), 60),
    ('window_spent', answer(429, anthropic_ratelimit_unified_status='rejected',
                            anthropic_ratelimit_unified_reset=int(START + 60)), 60),
    ('window_spent', answer(429, retry_after=50, anthropic_ratelimit_unified_5h_status='rejected'),
     50),
    ('family_window_spent',
     answer(429, **unified('5h', 'allowed', 10), **unified('7d', 'allowed_warning', 20),
            **unified('7d_opus', 'rejected', 3000), anthropic_ratelimit_unified_status='rejected',
            anthropic_ratelimit_unified_reset=int(START + 5)), 3000),
    ('rate_limited', answer(429, retry_after=20, **unified('overage', 'rejected', 99),
                            **unified('5h', 'allowed', 10)), 20),
    ('rate_limited', answer(429, retry_after='20'), 20),
    ('rate_limited', answer(429, retry_after='1.5'), 1.5),
    ('rate_limited',
     answer(429, anthropic_ratelimit_requests_remaining=0, anthropic_ratelimit_tokens_remaining=0,
            anthropic_ratelimit_requests_reset='2023-11-14T22:13:30Z',
            anthropic_ratelimit_tokens_reset='2023-11-14T22:13:50Z'), 30),
    ('spend_limit',
     answer(429, 'limit', 'rate_limit_error enforced_spend_limit_reached', retry_after=5), None),
    ('extra_usage', answer(429, 'Extra usage is required for long context requests.'), None),
    ('extra_usage',
     answer(429, anthropic_ratelimit_unified_overage_disabled_reason='out_of_credits'), None),
    ('request_limited', answer(429, x_should_retry='true'), None),
    ('throttled', answer(429), None), ('throttled', answer(429, retry_after='soon'), None),
    ('throttled', answer(429, x_should_retry='false'), None),
    ('throttled', answer(429, x_should_retry='true', anthropic_ratelimit_requests_remaining=5),
     None),
    ('other_limit', answer(429, retry_after=20, path='/v1/messages/count_tokens'), None),
    ('other_limit', answer(429, path='/v1/messages/count_tokens',
                           anthropic_ratelimit_unified_overage_disabled_reason='out_of_credits'),
     None),
    *(('server_error', answer(status), None) for status in (408, 500, 502, 503, 504, 520, 524)),
    ('overloaded', answer(529, 'Overloaded', 'overloaded_error'), None),
)


#: The same for OpenAI and its likenesses.
OPENAI_POLICY = (
    ('answered', answer(200), None), ('unreadable', answer(302), None),
    ('unsupported_parameter',
     answer(400, "Unsupported parameter: 'stop' is not supported with this model."), None),
    ('unsupported_parameter',
     answer(400, 'To use function tools, use /v1/responses or set reasoning_effort'), None),
    ('context_too_long',
     answer(400, 'too many tokens', 'invalid_request_error context_length_exceeded'), None),
    *(('context_too_long', answer(400, message), None) for message in (
        "This model's maximum context length is 8192 tokens.", 'Prompt exceeds max length',
        'The decoder prompt (length 41234) is longer than the maximum model length of 32768.',
        'The number of tokens to keep from the initial prompt is greater than the context length.',
        'The input token count (1196265) exceeds the maximum number of tokens allowed (1048576).',
        'prompt token count of 130490 exceeds the limit of 128000',
        'Input length 131393 exceeds the maximum allowed input length',
        'Input validation error: `inputs` must have less than 32768 tokens. Given: 40960',
        'litellm.ContextWindowExceededError: too much')),
    ('relayed', answer(400, 'The input image exceeds 20 MB'), None),
    ('context_too_long', answer(400, 'Your input exceeds the context window of this model.'),
     None),
    ('model_refused',
     answer(404, 'The model `x` does not exist', 'invalid_request_error model_not_found'), None),
    ('model_refused', answer(404, 'Not Found'), None),
    ('model_refused', answer(404, 'model "x" not found, try pulling'), None),
    ('model_refused',
     answer(400, "The 'x' model is not supported when using Codex with a ChatGPT account."), None),
    ('auth_failed', answer(401, 'Incorrect API key', 'invalid_request_error invalid_api_key'),
     None),
    ('auth_failed', answer(403, 'Country not supported', details={'code': 'x'}), None),
    ('network_refused', answer(403, '<html>Blocked by your company'), None),
    ('network_refused', answer(403, 'Country, region, or territory not supported',
                               'request_forbidden unsupported_country_region_territory',
                               details={'code': 'x'}), None),
    ('billing', answer(402, 'pay'), None),
    ('out_of_quota', answer(429, 'You exceeded your current quota',
                            'insufficient_quota insufficient_quota'), None),
    ('out_of_quota', answer(429, 'x', 'billing_hard_limit_reached'), None),
    ('out_of_quota',
     answer(429, 'Insufficient balance or no resource package. Please recharge.', '1113'), None),
    *(('out_of_quota', answer(403, message, details={'message': message}), None)
      for message in ("Your newly created team doesn't have any credits yet.",
                      'Sorry, your account balance is insufficient')),
    ('out_of_quota', answer(429, 'x', 'project_spend_limit_exceeded'), None),
    ('plan_limit', answer(429, 'x', 'usage_limit_reached', details={'resets_in_seconds': 500}),
     500),
    ('plan_limit', answer(429, 'x', 'usage_limit_reached', details={'resets_at': int(START) + 60}),
     60),
    ('plan_limit', answer(429, 'x', 'usage_limit_reached'), None),
    ('rate_limited', answer(429), None), ('rate_limited', answer(429, retry_after=20), 20),
    ('rate_limited', answer(429, retry_after=20, retry_after_ms='1500'), 1.5),
    ('rate_limited', answer(429, retry_after_ms='99999999999999'), None),
    ('rate_limited', answer(429, retry_after_ms='9' * 400), None),
    ('rate_limited', answer(429, 'Please try again in 41.7s.', x_ratelimit_reset_requests='6ms',
                            x_ratelimit_remaining_requests=9999), 41.7),
    ('rate_limited', answer(429, x_ratelimit_remaining_tokens=0, x_ratelimit_reset_tokens='6m0s',
                            x_ratelimit_remaining_requests=0, x_ratelimit_reset_requests='350ms'),
     360),
    ('rate_limited', answer(429, 'Please try again in 1m2.5s'), 62.5),
    ('rate_limited', answer(429, 'try again in 20ms'), .02),
    ('rate_limited', answer(429, 'Please retry in 136.4s.'), 136.4),
    ('rate_limited', answer(429, 'Please retry after 140 seconds.'), 140),
    ('overloaded', answer(503, 'x', 'server_is_overloaded'), None),
    ('overloaded', answer(529, 'Codex is at capacity'), None),
    ('overloaded', answer(498, 'Flex tier capacity exceeded. Please try again later.',
                          'capacity_exceeded'), None),
    ('overloaded', answer(529, 'x', 'overloaded_error'), None),
    ('overloaded', answer(503, 'The server is overloaded, please retry'), None),
    *(('server_error', answer(status), None) for status in (408, 500, 502, 503, 504)),
    ('overloaded', answer(529), None),
    ('rejected', answer(500, "1 validation error:\n"
                        "  {'type': 'literal_error', 'loc': ('body', 'response_format')"), None),
    ('model_refused', answer(400, 'Invalid model name passed in model=x. Call `/v1/models`'),
     None),
    ('relayed', answer(400, 'Invalid schema for function'), None), ('relayed', answer(422), None),
    ('relayed', answer(413), None),
)


class ClassificationTest(unittest.TestCase):
    def test_every_answer_means_what_its_row_says(self):
        for policy, rules in ((POLICY, cf.RULES), (OPENAI_POLICY, cf.OPENAI_RULES)):
            for name, given, seconds in policy:
                with self.subTest(rule=name, answer=given):
                    outcome = cf.classify(given, rules)
                    self.assertEqual(outcome.rule.name, name)
                    if name != 'usage_limit':
                        self.assertEqual(outcome.hint_s, seconds)

    def test_every_rule_has_a_case(self):
        self.assertEqual({rule.name for rule in cf.RULES}, {name for name, _, _ in POLICY})
        self.assertEqual({rule.name for rule in cf.OPENAI_RULES},
                         {name for name, _, _ in OPENAI_POLICY})

    def test_a_rule_that_cools_says_why_in_words(self):
        for rule in (*cf.RULES, *cf.OPENAI_RULES, cf.UNREACHABLE, cf.RESET):
            with self.subTest(rule=rule.name):
                self.assertRegex(rule.words, r'^[a-z0-9][a-z0-9 -]{5,40}$' if rule.scope else '^$')

    def test_durations_are_read_as_openai_writes_them(self):
        for text, seconds in (('6m0s', 360), ('350ms', 0.35), ('1h2m3.5s', 3723.5),
                              ('2d', 172_800), ('20', 20), ('1.5', 1.5), ('', None), (None, None),
                              ('soon', None), ('1.2.3', None), ('-5s', None)):
            self.assertEqual(cf.parse_duration(text), seconds, text)

    def test_an_error_inside_an_openai_stream_stands_for_a_status(self):
        for error, status in (
                ({'code': 'rate_limit_exceeded'}, 429),
                ({'type': 'usage_limit_reached'}, 429), ({'code': 'server_is_overloaded'}, 529),
                ({'message': 'Codex is at capacity'}, 529),
                ({'code': 'context_length_exceeded'}, 400), ({'code': 'image_too_large'}, 400),
                ({'code': 402}, 402), ({'code': '429'}, 429), ({'type': 'tokens'}, 429),
                ({'code': 9999}, 500), ({'code': 'project_spend_limit_exceeded'}, 429),
                ({'type': 'rate_limit_error'}, 429), ({'code': 'novel'}, 500),
                ({'code': ['x']}, 500), ({}, 500)):
            self.assertEqual(cf.error_status(error), status, error)

    def test_a_usage_limit_ends_at_the_date_it_names(self):
        message = ('You have reached your specified API usage limits. You will regain access on '
                   '2023-11-20 at 00:00 UTC.')
        self.assertEqual(cf.classify(answer(400, message)).hint_s, 1_700_438_400 - START)

    def test_retry_after_is_seconds_a_decimal_or_a_date(self):
        for value, seconds in (('20', 20), (' 20 ', 20), ('1.5', 1.5), ('0', 0),
                               ('Tue, 14 Nov 2023 22:14:20 GMT', 60),
                               ('Tue, 14 Nov 2023 22:00:00 GMT', 0), ('-5', None), ('soon', None),
                               ('', None), (None, None), ('99999999999', None), ('1e5', None),
                               ('\u0663', None), ('Tue, 99 Nov 2023 22:14:20 GMT', None),
                               ('Tue, 14 Nov 9999 22:14:20 GMT', None)):
            with self.subTest(value=value):
                self.assertEqual(cf.parse_retry_after(value, START), seconds)

    def test_a_date_field_that_came_twice_is_read_once_and_in_no_local_time(self):
        self.addCleanup(time.tzset)
        date = 'Tue, 14 Nov 2023 22:14:20 GMT'
        with mock.patch.dict(os.environ, TZ='Asia/Tokyo'):
            time.tzset()
            self.assertEqual(cf.parse_retry_after(f'{date}, {date}', START), 60)
            self.assertEqual(cf.upstream_now({'date': f'{date}, {date}'}, 0), START + 60)
            self.assertEqual(cf.parse_reset('2023-11-14T22:14:20Z, 2023-11-14T22:14:20Z', START),
                             60)

    def test_resets_are_unix_seconds_or_rfc_3339(self):
        for value, seconds in (('1700000060', 60), ('2023-11-14T22:14:20Z', 60),
                               ('2023-11-14T22:14:20+00:00', 60),
                               ('2023-11-14T23:14:20+01:00', 60), ('1699999999', None),
                               ('nonsense', None),
                               ('99999999999', None), ('', None), (None, None)):
            with self.subTest(value=value):
                self.assertEqual(cf.parse_reset(value, START), seconds)

    def test_an_error_body_in_any_shape_is_read(self):
        for body, told in (
                (json.dumps(api_error('x', 'y')), ('x', 'y')),
                ('{"error":{"type":"x","details":{"error_code":"c"},"message":"y"}}',
                 ('x c', 'y')),
                ('<html><style>p {}</style>bad\x1b <b>gateway</b>', ('', 'bad\ufffd gateway')),
                ('a <b>', ('', 'a <b>')), ('{"error":"text"}', ('', 'text')),
                ('{"error":{}}', ('', '{"error":{}}')), ('', ('', '')), ('[]', ('', '[]')),
                ('{"error":{"type":"x","code":"c","message":"y"}}', ('x c', 'y')),
                ('{"error":{"code":429,"message":"y"}}', ('429', 'y')),
                ('{"detail":"no"}', ('', 'no')),
                ('{"detail":[{"loc":["body","n"],"msg":"Extra"}]}', ('', 'n: Extra')),
                ('{"object":"error","message":"y","type":"BadRequestError","code":400}',
                 ('BadRequestError 400', 'y')), ('{"error":5}', ('', '{"error":5}')),
                ('{"error":{"message":{"a":1}}}', ('', "{'a': 1}"))):
            self.assertEqual(cf.read_error(body.encode())[:2], told)

    def test_only_the_beginning_of_an_endless_message_is_searched(self):
        message = 'organization ' * 10_000 + 'not ' * 10_000
        _, read, _ = cf.read_error(json.dumps(api_error('x', message)).encode())
        self.assertEqual(read, message[:cf.MAX_MESSAGE_CHARS])
        self.assertEqual(cf.classify(answer(403, read, 'permission_error')).rule.name, 'forbidden')

    def test_limits_are_read_from_every_providers_fields(self):
        now = START
        for headers, limits in (
                ({'anthropic-ratelimit-unified-5h-utilization': '0.42',
                  'anthropic-ratelimit-unified-5h-reset': f'{now + 600:.0f}',
                  'anthropic-ratelimit-unified-5h-status': 'allowed',
                  'anthropic-ratelimit-unified-7d_opus-utilization': '1',
                  'anthropic-ratelimit-unified-7d_opus-status': 'rejected',
                  'anthropic-ratelimit-unified-status': 'allowed'},
                 [('5h', 0.42, 600, 'allowed'), ('7d_opus', 1, None, 'rejected')]),
                ({'anthropic-ratelimit-input-tokens-limit': '1000',
                  'anthropic-ratelimit-input-tokens-remaining': '250',
                  'anthropic-ratelimit-input-tokens-reset': '2023-11-14T22:13:30Z'},
                 [('input tokens', 0.75, 10, None)]),
                ({'x-ratelimit-limit-requests': '100', 'x-ratelimit-remaining-requests': '99',
                  'x-ratelimit-reset-requests': '6m0s'}, [('requests', 0.01, 360, None)]),
                ({'x-codex-primary-used-percent': '12.5', 'x-codex-primary-window-minutes': '300',
                  'x-codex-primary-reset-after-seconds': '60',
                  'x-codex-secondary-used-percent': '50',
                  'x-codex-secondary-window-minutes': '10080'},
                 [('5h', 0.125, 60, None), ('7d', 0.5, None, None)]),
                ({'x-codex-spark-primary-used-percent': '100',
                  'x-codex-spark-primary-window-minutes': '300'}, [('5h_spark', 1, None, None)]),
                ({'anthropic-ratelimit-requests-remaining': '5',
                  'x-ratelimit-remaining-tokens': 'x', 'x-codex-primary-used-percent': 'nan',
                  'anthropic-ratelimit-tokens-remaining': '5',
                  'anthropic-ratelimit-tokens-limit': '0', 'content-type': 'x'}, [])):
            with self.subTest(headers=headers):
                read = cf.read_limits(headers, now)
                self.assertEqual([(limit.name, round(limit.used, 6),
                                   limit.resets_s and round(limit.resets_s), limit.status)
                                  for limit in read], limits)
                self.assertEqual(cf.tells_limits(headers), True)
        self.assertFalse(cf.tells_limits({'content-type': 'x'}))

    def test_the_pace_of_a_window_says_when_it_is_used_up(self):
        hour, day = 3600, 86_400
        for name, used, resets_s, pace, spent_s in (
                ('5h', 0.5, 4 * hour, 2.5, hour), ('5h', 0.9, 2.5 * hour, 1.8, 2.5 * hour / 9),
                ('5h', 0.1, 2.5 * hour, None, None),    # will last: nothing to say
                ('7d', 0.8, 3.5 * day, 1.6, 0.875 * day),
                ('7d_opus', 0.8, 3.5 * day, 1.6, 0.875 * day), ('7d', 0.3, 3.5 * day, 0.6, None),
                ('1.5d', 0.5, 1.125 * day, 2, 0.375 * day), ('5h_spark', 0.5, 4 * hour, 2.5, hour),
                ('5h', 0.5, 4.9 * hour, None, None), ('5h', 0.029, 2 * hour, None, None),  # chance
                ('7d', 1, day, None, None), ('7d', 1.2, day, None, None),
                ('7d', 0.5, None, None, None), ('7d', 0.5, 8 * day, None, None),
                ('requests', 0.5, 30, None, None), ('primary', 0.5, 30, None, None)):
            with self.subTest(name=name, used=used, resets_s=resets_s):
                said, spent_at = cf.window_pace(name, used, resets_s, START)
                self.assertEqual((said and round(said, 6),
                                  spent_at and round(spent_at - START, 3)),
                                 (pace, spent_s and round(spent_s, 3)))

    def test_a_limit_that_resets_in_a_million_years_has_no_reset(self):
        for field, value in (('x-ratelimit-reset-requests', '9' * 14),
                             ('x-ratelimit-reset-requests', '9' * 400),
                             ('x-codex-primary-reset-after-seconds', '9' * 400)):
            headers = {'x-ratelimit-remaining-requests': '1', 'x-ratelimit-limit-requests': '2',
                       'x-codex-primary-used-percent': '50', field: value}
            self.assertEqual([(limit.used, limit.resets_s)
                              for limit in cf.read_limits(headers, START)], [(0.5, None)] * 2)


# ==============================================================================
# Event streams
# ==============================================================================

class EventStreamsTest(unittest.TestCase):
    def test_an_event_that_comes_in_small_pieces_is_searched_once(self):
        class Counted(bytearray):
            searched = 0

            def rfind(self, sub, start=0, *end):
                Counted.searched += len(self) - start
                return super().rfind(sub, start, *end)
        stream, event = cf.MessageStream(), b'data: ' + b'a' * 5000 + b'\r\n\r\n'
        with mock.patch.object(cf, 'bytearray', Counted, create=True):
            told = [stream.feed(piece) for piece in pieces(event, 1)]
        self.assertEqual((b''.join(told), told[-1]), (event, event))
        self.assertTrue(len(event) < Counted.searched < 10 * len(event), Counted.searched)

    def read(self, data, size=None):
        stream = cf.MessageStream()
        return stream, [stream.feed(piece) for piece in pieces(data, size or len(data))]

    def test_reads_may_fall_anywhere(self):
        for newline in (b'\n', b'\r\n'):
            data = stream_bytes(stream_events('He said: "event: error", é 世界'), newline)
            for size in [*range(1, 60), len(data)]:
                with self.subTest(newline=newline, size=size):
                    stream, passed = self.read(data, size)
                    self.assertEqual(b''.join(passed), data)
                    self.assertEqual((stream.opened_by, stream.stopped, stream.stop_reason,
                                      stream.failure),
                                     ('content_block_start', True, 'end_turn', None))
                    self.assertEqual(stream.usage, {'input_tokens': 10, 'output_tokens': 5})

    def test_only_whole_events_pass(self):
        data = stream_bytes()
        for cut in range(len(data)):
            stream = cf.MessageStream()
            passed = stream.feed(data[:cut])
            self.assertTrue(passed == b'' or passed.endswith(b'\n\n'))
            read_events(passed)

    def test_an_event_leaves_as_soon_as_it_is_whole(self):
        stream = cf.MessageStream()
        for event in stream_events():
            self.assertEqual(stream.feed(cf.event_bytes(event)), cf.event_bytes(event))

    def test_message_start_and_ping_do_not_open_a_stream(self):
        stream, _ = self.read(stream_bytes(stream_events()[:2]))
        self.assertIsNone(stream.opened_by)

    def test_an_error_opens_it_only_when_it_comes_first(self):
        stream, _ = self.read(stream_bytes([*stream_events()[:2], OVERLOADED_EVENT]))
        self.assertEqual((stream.opened_by, stream.failure['type']), ('error', 'overloaded_error'))
        stream, _ = self.read(stream_bytes([*stream_events()[:3], OVERLOADED_EVENT]))
        self.assertEqual((stream.opened_by, stream.failure['type']),
                         ('content_block_start', 'overloaded_error'))

    def test_comments_and_odd_events_pass_unread(self):
        data = b': comment\n\ndata: not json\n\nevent: x\ndata: [1]\n\n\n\n' + stream_bytes()
        stream, passed = self.read(data)
        self.assertEqual((b''.join(passed), stream.opened_by), (data, 'content_block_start'))

    def test_a_last_event_without_its_blank_line_is_whole_only_as_json(self):
        data = stream_bytes()
        stream, _ = self.read(data[:-2])
        self.assertFalse(stream.stopped)
        self.assertEqual((stream.last(), stream.stopped),
                         (cf.event_bytes({'type': 'message_stop'}), True))
        stream, _ = self.read(data[:-5])
        self.assertEqual(stream.last(), b'')

    def test_after_a_cut_nothing_more_passes(self):
        stream, _ = self.read(stream_bytes()[:-2])
        self.assertEqual((stream.last(is_cut=True), stream.stopped), (b'', False))

    def test_a_failure_stands_for_a_status(self):
        for type, status in (('overloaded_error', 529), ('rate_limit_error', 429), ('odd', 500),
                             (None, 500)):
            stream, _ = self.read(stream_bytes([{'type': 'error', 'error': {'type': type}}]))
            self.assertEqual(stream.failure_status, status)

    def test_events_of_odd_shape_break_nothing(self):
        events = [{'type': 'message_start', 'message': 5},
                  {'type': 'message_delta', 'delta': 'x', 'usage': [1]},
                  {'type': 'error', 'error': 'text'}, {'type': ['x']}]
        stream, passed = self.read(stream_bytes(events[:3]))
        self.assertEqual((b''.join(passed), stream.failure),
                         (stream_bytes(events[:3]), {'message': 'text'}))

    def test_a_stop_reason_counts_without_usage(self):
        stream, _ = self.read(stream_bytes([*stream_events()[:-2], {
            'type': 'message_delta', 'delta': {'stop_reason': 'end_turn'}}]))
        self.assertEqual(stream.stop_reason, 'end_turn')

    def test_an_endless_event_passes_in_parts(self):
        stream = cf.MessageStream()
        with mock.patch.object(cf, 'MAX_EVENT_BYTES', 100):
            self.assertEqual(stream.feed(b'data: ' + b'x' * 90), b'')
            self.assertEqual(len(stream.feed(b'x' * 90)), 186)


# ==============================================================================
# Request translation
# ==============================================================================

CHAT = cf.Target(cf.CHAT_COMPLETIONS, 'https://api.openai.com', 'gpt-5.4')
LOCAL = cf.Target(cf.CHAT_COMPLETIONS, 'http://localhost:1/v1', 'llama')
PLATFORM = cf.Target(cf.RESPONSES, 'https://api.openai.com', 'gpt-5.4')
CODEX = cf.Target(cf.RESPONSES, 'https://chatgpt.com/backend-api/codex', 'gpt-5.4', is_codex=True)

PNG = {'type': 'base64', 'media_type': 'image/png', 'data': 'iVBOR'}
PDF = {'type': 'base64', 'media_type': 'application/pdf', 'data': 'JVBER'}
WEATHER = {'name': 'get_weather', 'description': 'The weather', 'input_schema': {
    'type': 'object', 'properties': {'city': {'type': 'string'}}, 'required': ['city']}}


def tool_use(id, name='get_weather', **input):
    return {'type': 'tool_use', 'id': id, 'name': name, 'input': input}


def tool_result(id, content='ok', **fields):
    return {'type': 'tool_result', 'tool_use_id': id, 'content': content, **fields}


def translated(target, **changes):
    """(the body for a target, what was left out) of a Messages request."""
    conversation = cf.read_conversation(messages_body(**changes))
    return cf.WIRES[target.wire].translate(conversation, target), list(conversation.notes.left_out)


def chat_messages(*messages, target=CHAT, **changes):
    """The translated messages of a conversation given as (role, content), ..."""
    turns = [{'role': role, 'content': content} for role, content in messages]
    return translated(target, messages=turns, **changes)[0]['messages']


def responses_input(*messages, target=PLATFORM, **changes):
    turns = [{'role': role, 'content': content} for role, content in messages]
    return translated(target, messages=turns, **changes)[0]['input']


class RequestTranslationTest(unittest.TestCase):
    maxDiff = None

    def test_a_plain_request_in_each_wire_format(self):
        self.assertEqual(translated(CHAT, system='Be brief.', stream=True)[0], {
            'model': 'gpt-5.4', 'messages': [{'role': 'system', 'content': 'Be brief.'},
                                             {'role': 'user', 'content': 'hi'}],
            'max_completion_tokens': 100, 'stream': True,
            'stream_options': {'include_usage': True}})
        said = {'type': 'message', 'role': 'user',
                'content': [{'type': 'input_text', 'text': 'hi'}]}
        self.assertEqual(translated(PLATFORM, system='Be brief.')[0],
                         {'model': 'gpt-5.4', 'instructions': 'Be brief.', 'input': [said],
                          'parallel_tool_calls': True, 'store': False, 'stream': True,
                          'max_output_tokens': 100, 'include': ['reasoning.encrypted_content']})
        self.assertEqual(translated(CODEX)[0],
                         {'model': 'gpt-5.4', 'instructions': cf.DEFAULT_INSTRUCTIONS,
                          'input': [said], 'parallel_tool_calls': True, 'store': False,
                          'stream': True, 'include': ['reasoning.encrypted_content']})

    def test_what_only_anthropic_knows_is_not_sent(self):
        changes = {name: {'x': 1} for name in (
            'context_management', 'container', 'speed', 'inference_geo', 'service_tier', 'betas',
            'diagnostics', 'top_k', 'cache_control', 'fallbacks', 'safeguards', 'novelty')}
        for target in (CHAT, PLATFORM, CODEX):
            self.assertEqual(translated(target, **changes), translated(target))

    def test_the_system_prompt_is_one_text_without_the_billing_line(self):
        system = [{'type': 'text', 'text': 'x-anthropic-billing-header: cc_version=2.1;'},
                  {'type': 'text', 'text': ''},
                  {'type': 'text', 'text': 'One.', 'cache_control': {'type': 'ephemeral'}},
                  {'type': 'text', 'text': 'Two.'}]
        self.assertEqual(chat_messages(('user', 'x'), system=system)[0],
                         {'role': 'system', 'content': 'One.\n\nTwo.'})
        self.assertEqual(translated(CODEX, system=system)[0]['instructions'], 'One.\n\nTwo.')
        self.assertEqual(chat_messages(('user', 'x'), system=system[:2])[0]['role'], 'user')

    def test_user_blocks_become_parts_or_one_text(self):
        image = {'type': 'image_url', 'image_url': {'url': 'data:image/png;base64,iVBOR'}}
        text = {'type': 'text', 'text': 'a'}
        for blocks, content in (
                ([text, {'type': 'text', 'text': ''},
                  {'type': 'text', 'text': 'b', 'cache_control': {}}], 'a\nb'),
                ([text, {'type': 'image', 'source': PNG}], [text, image]),
                ([{'type': 'image', 'source': {'type': 'url', 'url': 'https://x/y.png'}}],
                 [{'type': 'image_url', 'image_url': {'url': 'https://x/y.png'}}]),
                ([{'type': 'document', 'source': PDF, 'title': 'My.pdf'}],
                 [{'type': 'file', 'file': {'filename': 'My.pdf',
                                            'file_data': 'data:application/pdf;base64,JVBER'}}]),
                ([{'type': 'document', 'source': {'type': 'text', 'data': 'words'}, 'title': 'T'}],
                 'T\nwords'),
                ([{'type': 'document', 'source': {'type': 'content', 'content': [text, text]}}],
                 'a\na'),
                ([{'type': 'document', 'source': {'type': 'url', 'url': 'https://x/y.pdf'}}],
                 [{'type': 'text', 'text': '[document: https://x/y.pdf]'}]),
                ([{'type': 'search_result', 'title': 'T', 'source': 'https://x',
                   'content': [text]}], 'T (https://x)\na')):
            self.assertEqual(chat_messages(('user', blocks)),
                             [{'role': 'user', 'content': content}])

    def test_media_in_the_responses_format(self):
        blocks = [{'type': 'image', 'source': PNG}, {'type': 'document', 'source': PDF},
                  {'type': 'document', 'source': {'type': 'url', 'url': 'https://x/y.pdf'}}]
        self.assertEqual(responses_input(('user', blocks))[0]['content'], [
            {'type': 'input_image', 'image_url': 'data:image/png;base64,iVBOR', 'detail': 'auto'},
            {'type': 'input_file', 'filename': 'document.pdf',
             'file_data': 'data:application/pdf;base64,JVBER'},
            {'type': 'input_file', 'file_url': 'https://x/y.pdf'}])

    def test_what_cannot_be_carried_is_named_and_replaced_by_a_note(self):
        for target, block, text, left_out in (
                (LOCAL, {'type': 'document', 'source': PDF}, '[document omitted: document.pdf]',
                 'document'),
                (CHAT, {'type': 'image', 'source': {'type': 'file', 'file_id': 'f1'}},
                 '[image omitted: f1]', 'image file'),
                (CHAT, {'type': 'document', 'source': {'type': 'file', 'file_id': 'f1'}},
                 '[document omitted: f1]', 'document file'),
                (CHAT, {'type': 'container_upload', 'file_id': 'f1'}, '[container_upload omitted]',
                 'container_upload block'),
                (CHAT, {'type': 'novel'}, '[novel omitted]', 'novel block')):
            body, told = translated(target, messages=[{'role': 'user', 'content': [block]}])
            self.assertIn(text, json.dumps(body))
            self.assertEqual(told, [left_out])

    def test_neighbours_of_one_role_are_one_turn_and_empty_turns_none(self):
        self.assertEqual(chat_messages(('user', 'a'), ('user', 'b'), ('assistant', []),
                                       ('user', [])), [{'role': 'user', 'content': 'a\nb'}])

    def test_thinking_is_no_text_and_goes_back_only_to_its_own_provider(self):
        thinking = [{'type': 'thinking', 'thinking': 'secret', 'signature': 'EqAnthropic'},
                    {'type': 'redacted_thinking', 'data': 'op'},
                    {'type': 'thinking', 'thinking': 'mine', 'signature': 'cfo1:gAAA'},
                    {'type': 'text', 'text': 'yes'}]
        turns = ('user', 'x'), ('assistant', thinking), ('user', 'y')
        self.assertEqual(chat_messages(*turns)[1], {'role': 'assistant', 'content': 'yes'})
        self.assertEqual(responses_input(*turns)[1:3], [
            {'type': 'reasoning', 'summary': [], 'encrypted_content': 'gAAA'},
            {'type': 'message', 'role': 'assistant', 'content': 'yes'}])
        said = translated(CODEX, messages=[{'role': 'assistant', 'content': 'yes'}])[0]['input'][0]
        self.assertEqual(said['content'], [{'type': 'output_text', 'text': 'yes'}])

    def test_calls_and_results_meet_in_the_order_of_the_calls(self):
        turns = (('user', 'go'),
                 ('assistant',
                  [tool_use('t1', city='Rome'), {'type': 'text', 'text': 'both'}, tool_use('t2')]),
                 ('user', [{'type': 'text', 'text': 'and now'},
                           tool_result('t2', [{'type': 'text', 'text': 'r2'}], is_error=True),
                           tool_result('t1', []), tool_result('t1', 'again')]))
        self.assertEqual(chat_messages(*turns)[1:], [
            {'role': 'assistant', 'content': 'both', 'tool_calls': [
                {'id': 't1', 'type': 'function',
                 'function': {'name': 'get_weather', 'arguments': '{"city":"Rome"}'}},
                {'id': 't2', 'type': 'function',
                 'function': {'name': 'get_weather', 'arguments': '{}'}}]},
            {'role': 'tool', 'tool_call_id': 't1', 'content': '(no output)'},
            {'role': 'tool', 'tool_call_id': 't2', 'content': '[tool error]\nr2'},
            {'role': 'user', 'content': 'and now'}])
        items = responses_input(*turns)
        self.assertEqual([item['type'] for item in items],
                         ['message', 'function_call', 'message', 'function_call',
                          *2 * ['function_call_output'], 'message'])
        self.assertEqual(items[1], {'type': 'function_call', 'name': 'get_weather',
                                    'call_id': 't1', 'arguments': '{"city":"Rome"}'})
        self.assertEqual(items[5], {'type': 'function_call_output', 'call_id': 't2',
                                    'output': '[tool error]\nr2'})

    def test_a_missing_result_is_made_up_and_one_without_a_call_becomes_text(self):
        messages = chat_messages(('assistant', [tool_use('t1')]),
                                 ('user', [tool_result('gone', 'old')]))
        self.assertEqual(messages[1:], [
            {'role': 'tool', 'tool_call_id': 't1', 'content': cf.NO_RESULT},
            {'role': 'user', 'content': '[result of an earlier tool call gone]\nold'}])
        self.assertEqual(chat_messages(('assistant', [tool_use('t1')]))[1]['content'],
                         cf.NO_RESULT)
        self.assertEqual(chat_messages(('user', [tool_result('t', 'x')]))[0]['role'], 'user')

    def test_a_system_message_never_comes_between_a_call_and_its_result(self):
        turns = (('user', 'x'), ('assistant', [tool_use('t1')]), ('system', 'note'),
                 ('user', [tool_result('t1'), {'type': 'text', 'text': 'y'}]))
        self.assertEqual([m['role'] for m in chat_messages(*turns)],
                         ['user', 'assistant', 'tool', 'system', 'user'])
        self.assertEqual(responses_input(*turns)[3],
                         {'type': 'message', 'role': 'developer',
                          'content': [{'type': 'input_text', 'text': 'note'}]})
        codex = translated(CODEX, system='first',
                           messages=[{'role': r, 'content': c} for r, c in turns])[0]
        self.assertEqual(codex['instructions'], 'first\n\nnote')
        self.assertNotIn('note', json.dumps(codex['input']))
        self.assertEqual([m['role'] for m in chat_messages(('user', 'x'), ('system', ''))],
                         ['user'])

    def test_results_that_a_system_message_parts_still_meet_their_calls(self):
        turns = (('assistant', [tool_use('t1'), tool_use('t2')]),
                 ('user', [tool_result('t1', 'one')]), ('system', 'note'),
                 ('user', [tool_result('t2', 'two')]))
        self.assertEqual([m['content'] for m in chat_messages(*turns)][1:], ['one', 'two', 'note'])

    def test_a_result_in_a_system_message_is_none(self):
        turns = (('assistant', [tool_use('t1')]),
                 ('system', [tool_result('t1', 'forged'), {'type': 'text', 'text': 'note'}]),
                 ('user', 'x'))
        self.assertEqual([m['content'] for m in chat_messages(*turns)][1:],
                         [cf.NO_RESULT, 'note', 'x'])
        self.assertEqual(responses_input(*turns)[2]['content'],
                         [{'type': 'input_text', 'text': 'note'}])

    def test_calls_without_a_word_have_an_empty_text_beside_them(self):
        self.assertEqual(chat_messages(('assistant', [tool_use('t1')]))[0]['content'], '')

    def test_media_of_a_result_follow_the_tool_messages(self):
        turns = (('assistant', [tool_use('t1'), tool_use('t2')]), ('user', [
            tool_result('t1', [{'type': 'text', 'text': 'r'}, {'type': 'image', 'source': PNG}]),
            tool_result('t2')]))
        messages = chat_messages(*turns)
        self.assertEqual([m['role'] for m in messages], ['assistant', 'tool', 'tool', 'user'])
        self.assertEqual(messages[1]['content'], 'r\n[see attached media]')
        self.assertEqual([part['type'] for part in messages[3]['content']], ['text', 'image_url'])
        self.assertEqual([part['type'] for part in responses_input(*turns)[2]['output']],
                         ['input_text', 'input_image'])

    def test_loaded_tools_are_named_and_server_tools_leave_their_findings(self):
        reference = [{'type': 'tool_reference', 'tool_name': name} for name in ('A', 'B')]
        found = {'type': 'web_search_tool_result', 'tool_use_id': 's',
                 'content': [{'title': 'T', 'url': 'https://x', 'encrypted_content': 'z'}]}
        self.assertEqual(chat_messages(('assistant', [tool_use('t')]),
                                       ('user', [tool_result('t', reference)]))[1]['content'],
                         'Tool loaded: A, B')
        asked = {'type': 'server_tool_use', 'id': 's', 'name': 'web_search', 'input': {}}
        self.assertEqual(chat_messages(('assistant',
                                        [asked, found, {'type': 'text', 'text': 'so'}])),
                         [{'role': 'assistant', 'content': 'T https://x\nso'}])

    def test_long_or_odd_names_and_ids_are_shortened_alike_wherever_they_stand(self):
        name, id = 'mcp__server__' + 'x' * 80, 'toolu:' + 'a' * 70
        changes = {'tools': [{**WEATHER, 'name': name}],
                   'tool_choice': {'type': 'tool', 'name': name},
                   'messages': [{'role': 'assistant', 'content': [tool_use(id, name)]},
                                {'role': 'user', 'content': [tool_result(id)]}]}
        for target, limit in ((CHAT, 40), (PLATFORM, 64)):
            text = json.dumps(translated(target, **changes)[0])
            short = re.search(r'mcp__server__x*_[0-9a-f]{8}"', text).group()[:-1]
            self.assertEqual((len(short), text.count(short)), (64, 3))
            ids = set(re.findall(r'toolu_a+_[0-9a-f]{16}', text))
            self.assertEqual([len(found) for found in ids], [limit])
        names = cf.read_conversation(messages_body(**changes)).names
        self.assertEqual(names[short], name)
        self.assertNotEqual(cf.short_name(name), cf.short_name(name + 'y'))

    def test_tools_in_each_wire_format(self):
        tools = [{**WEATHER, 'cache_control': {}, 'type': 'custom', 'defer_loading': True},
                 {'name': 'bare', 'input_schema': {'type': 'object'}}]
        parameters = {'type': 'object', 'properties': {'city': {'type': 'string'}},
                      'required': ['city']}
        bare = {'name': 'bare', 'parameters': {'type': 'object', 'properties': {}}}
        self.assertEqual(translated(CHAT, tools=tools)[0]['tools'], [
            {'type': 'function', 'function': {'name': 'get_weather', 'description': 'The weather',
                                              'parameters': parameters}},
            {'type': 'function', 'function': bare}])
        self.assertEqual(translated(CODEX, tools=tools)[0]['tools'], [
            {'type': 'function', 'name': 'get_weather', 'description': 'The weather',
             'parameters': parameters, 'strict': False},
            {'type': 'function', **bare, 'strict': False}])

    def test_tools_that_have_no_equivalent(self):
        placeholder = {'name': 'DeferredToolPlaceholder', 'description': 'never',
                       'input_schema': {}, 'defer_loading': True}
        search = {'type': 'web_search_20250305', 'name': 'web_search', 'max_uses': 8,
                  'allowed_domains': ['x.org']}
        self.assertEqual(translated(CHAT, tools=[placeholder, search],
                                    tool_choice={'type': 'auto'}),
                         (translated(CHAT)[0], ['tool web_search']))
        sent = translated(CODEX, tools=[search],
                          tool_choice={'type': 'tool', 'name': 'web_search'})[0]
        self.assertEqual((sent['tools'], sent['tool_choice']), (
            [{'type': 'web_search', 'filters': {'allowed_domains': ['x.org']}}], 'required'))
        sent = translated(CODEX, tools=[WEATHER, search],
                          tool_choice={'type': 'tool', 'name': 'web_search'})[0]
        self.assertEqual(sent['tool_choice'], {'type': 'allowed_tools', 'mode': 'required',
                                               'tools': [{'type': 'web_search'}]})
        body, told = translated(CHAT,
                                tools=[WEATHER, {'type': 'computer_20250124', 'name': 'computer'}])
        self.assertEqual((len(body['tools']), told), (1, ['tool computer_20250124']))
        computer = {'type': 'computer_20250124', 'name': 'computer'}
        sent = translated(CODEX, tools=[computer, search],
                          tool_choice={'type': 'tool', 'name': 'computer'})[0]
        self.assertNotIn('tool_choice', sent)         # another tool is not forced in its place
        names = [t['function']['name'] for t in translated(CHAT, tools=[
            {'type': 'bash_20250124', 'name': 'bash'},
            {'type': 'text_editor_20250728', 'name': 'editor'}])[0]['tools']]
        self.assertEqual(names, ['bash', 'editor'])
        body, told = translated(CHAT, tools=[{**WEATHER, 'name': f't{n}'} for n in range(130)])
        self.assertEqual((len(body['tools']), told), (128, ['tools beyond 128']))
        chosen = translated(CHAT, tools=[{**WEATHER, 'name': f't{n}'} for n in range(130)],
                            tool_choice={'type': 'tool', 'name': 't129'})[0]
        self.assertIn('t129', [tool['function']['name'] for tool in chosen['tools']])
        self.assertEqual(translated(CHAT, tools=[], tool_choice={
            'type': 'auto', 'disable_parallel_tool_use': True}), translated(CHAT))

    def test_every_tool_choice(self):
        for choice, chat, responses in (
                ({'type': 'auto'}, 'auto', 'auto'),
                ({'type': 'any'}, 'required', 'required'), ({'type': 'none'}, 'none', 'none'),
                ({'type': 'tool', 'name': 'get_weather'},
                 {'type': 'function', 'function': {'name': 'get_weather'}},
                 {'type': 'function', 'name': 'get_weather'}), (None, None, None)):
            self.assertEqual(translated(CHAT, tools=[WEATHER],
                                        tool_choice=choice)[0].get('tool_choice'), chat)
            self.assertEqual(translated(PLATFORM, tools=[WEATHER],
                                        tool_choice=choice)[0].get('tool_choice'), responses)
        one = {'tools': [WEATHER],
               'tool_choice': {'type': 'auto', 'disable_parallel_tool_use': True}}
        for target in (CHAT, PLATFORM, CODEX):
            self.assertIs(translated(target, **one)[0]['parallel_tool_calls'], False)
            with self.assertRaisesRegex(cf.Untranslatable, "no tool 'nope'"):
                translated(target, tools=[WEATHER], tool_choice={'type': 'tool', 'name': 'nope'})

    def test_schemas_that_openai_refuses_are_mended_without_another_meaning(self):
        for schema, cleaned in (
                ({'type': 'object'}, {'type': 'object', 'properties': {}}),
                (None, {'type': 'object', 'properties': {}}),
                ({'$schema': 'x', 'type': 'object', 'properties': {
                    'format': {'type': 'string', 'format': 'uri'}, 'type': {'type': 'array'},
                    'enum': {'enum': [{'type': 'array'}]}, 'o': {'type': 'object'},
                    'free': {'type': 'object', 'additionalProperties': {'type': 'array'}}},
                  '$defs': {'d': {'type': ['array', 'null']}}}, {'type': 'object', 'properties': {
                      'format': {'type': 'string'}, 'type': {'type': 'array', 'items': {}},
                      'enum': {'enum': [{'type': 'array'}]},
                      'o': {'type': 'object', 'properties': {}},
                      'free': {'type': 'object',
                               'additionalProperties': {'type': 'array', 'items': {}}}}, '$defs': {
                                   'd': {'type': ['array', 'null'], 'items': {}}}})):
            notes = cf.Notes()
            self.assertEqual(cf.clean_root_schema(schema, notes), cleaned)
            self.assertEqual(notes.left_out, {})

    def test_alternatives_at_the_top_of_a_schema_are_merged_and_told(self):
        schema = {'anyOf': [{'properties': {'a': {'type': 'string'}}, 'required': ['a']},
                            {'$ref': '#/$defs/B'}],
                  'allOf': [{'properties': {'c': {}}, 'required': ['c']}],
                  '$defs': {'B': {'properties': {'b': {}}}}}
        notes = cf.Notes()
        merged = cf.clean_root_schema(schema, notes)
        self.assertEqual((merged['type'], set(merged['properties']), merged['required']),
                         ('object', {'a', 'b', 'c'}, ['c']))
        self.assertNotIn('anyOf', merged)
        self.assertEqual(len(notes.left_out), 1)
        for odd in ({'anyOf': [], 'required': [{}]}, {'properties': None, 'not': {}},
                    {'allOf': [{'required': 5, 'properties': []}]}):
            self.assertEqual(cf.clean_root_schema(odd, notes),
                             {'type': 'object', 'properties': {}, 'required': []})

    def test_a_structured_output_is_strict_only_where_its_schema_is(self):
        strict = {'type': 'object', 'properties': {'t': {'type': 'string'}}, 'required': ['t'],
                  'additionalProperties': False}
        for schema, is_strict in (
                (strict, True), ({**strict, 'required': []}, False), ({'type': 'object'}, False),
                ({**strict, 'properties': {'t': {'type': 'object', 'properties': {}}}}, False)):
            wanted = {'type': 'json_schema', 'schema': schema}
            for changes in ({'output_config': {'format': wanted}}, {'output_format': wanted}):
                told = {'name': 'answer', 'schema': schema, 'strict': is_strict}
                self.assertEqual(translated(CHAT, **changes)[0]['response_format'],
                                 {'type': 'json_schema', 'json_schema': told})
                self.assertEqual(translated(CODEX, **changes)[0]['text'],
                                 {'format': {'type': 'json_schema', **told}})

    def test_the_effort_is_what_each_model_takes(self):
        tools, high = {'tools': [WEATHER]}, {'output_config': {'effort': 'high'}}
        for model, changes, effort in (
                ('gpt-5.4', high, 'high'),
                ('gpt-5.4', {**high, **tools}, None), ('gpt-5.5', {**high, **tools}, 'none'),
                ('gpt-5.5', tools, 'none'), ('gpt-5.6-mini', high, 'high'),
                ('gpt-5.10', tools, 'none'), ('gpt-5', {**high, **tools}, 'high'),
                ('gpt-5-mini', {'output_config': {'effort': 'xhigh'}}, 'high'),
                ('o3', {'output_config': {'effort': 'max'}}, 'high'),
                ('gpt-5.5', {'output_config': {'effort': 'max'}}, 'max'),
                ('gpt-5.2', {'output_config': {'effort': 'max'}}, 'xhigh'),
                ('gpt-4.1', high, None), ('llama', high, None), ('openai/gpt-5', high, 'high'),
                ('gpt-5-chat-latest', high, None),
                ('gpt-5', {'thinking': {'type': 'enabled', 'budget_tokens': 2048}}, 'low'),
                ('gpt-5', {'thinking': {'type': 'enabled', 'budget_tokens': 10000}}, 'medium'),
                ('gpt-5', {'thinking': {'type': 'enabled', 'budget_tokens': 31999}}, 'high'),
                ('gpt-5', {'thinking': {'type': 'adaptive'}}, 'medium'),
                ('gpt-5', {'thinking': {'type': 'disabled'}, **high}, None),
                ('gpt-5', {}, None), ('gpt-5', {'output_config': {'effort': 'novel'}}, None)):
            with self.subTest(model=model, changes=changes):
                body = translated(CHAT._replace(model=model), **changes)[0]
                self.assertEqual(body.get('reasoning_effort'), effort)

    def test_tools_and_reasoning_go_together_in_the_responses_format(self):
        changes = {'tools': [WEATHER], 'output_config': {'effort': 'high'}}
        for thinking, reasoning in (({'type': 'adaptive'}, {'effort': 'high', 'summary': 'auto'}),
                                    ({'type': 'adaptive', 'display': 'omitted'},
                                     {'effort': 'high'}), ({'type': 'disabled'}, None)):
            for target in (PLATFORM, CODEX):
                self.assertEqual(translated(target, thinking=thinking,
                                            **changes)[0].get('reasoning'), reasoning)

    def test_sampling_stops_and_limits_are_what_each_model_takes(self):
        given = {'temperature': 0.5, 'top_p': 0.9, 'stop_sequences': ['x'], 'max_tokens': 200_000}
        sampling, stop = {'temperature': 0.5, 'top_p': 0.9}, {'stop': ['x']}
        for model, changes, sent in (
                ('o3', {}, {'max_completion_tokens': 100_000}),
                ('gpt-5', {}, {'max_completion_tokens': 128_000}),
                ('gpt-5.4', {}, {**sampling, 'max_completion_tokens': 128_000}),
                ('gpt-5.4', {'output_config': {'effort': 'low'}},
                 {'max_completion_tokens': 128_000, 'reasoning_effort': 'low'}),
                ('gpt-5.5', {}, {**stop, 'max_completion_tokens': 128_000}),
                ('gpt-4.1', {}, {**sampling, **stop, 'max_completion_tokens': 32_768}),
                ('gpt-4o-mini', {}, {**sampling, **stop, 'max_completion_tokens': 16_384}),
                ('llama', {}, {**sampling, **stop, 'max_tokens': 200_000})):
            with self.subTest(model=model):
                body = translated(CHAT._replace(model=model), **given, **changes)[0]
                del body['messages'], body['model']
                self.assertEqual(body, sent)
        self.assertEqual(translated(CHAT, max_tokens=0)[0]['max_completion_tokens'], 1)
        self.assertEqual(translated(PLATFORM, max_tokens=5)[0]['max_output_tokens'], 16)
        self.assertNotIn('stop', translated(LOCAL, stop_sequences=list('abcde'))[0])
        self.assertEqual(translated(LOCAL._replace(is_openai=True))[0]['max_completion_tokens'],
                         100)

    def test_the_user_is_told_to_openai_alone_and_only_as_a_hash(self):
        claude_code = {'user_id': json.dumps({'device_id': 'd', 'session_id': '0000-4000'})}
        for target in (CHAT._replace(is_openai=True), PLATFORM._replace(is_openai=True), CODEX):
            body = translated(target, metadata=claude_code)[0]
            self.assertEqual(body['prompt_cache_key'], '0000-4000')
            self.assertNotIn('device_id', json.dumps(body))
            self.assertEqual(len(translated(target, metadata={
                'user_id': 'me@example.org'})[0]['prompt_cache_key']), 64)
        self.assertEqual(translated(LOCAL, metadata=claude_code), translated(LOCAL))

    def test_a_request_without_anything_to_say_is_refused(self):
        for messages in ([], None, 'x', [{'role': 'user', 'content': ''}],
                         [{'role': 'system', 'content': 'x'}],
                         [{'role': 'tool', 'content': 'x'}], [5]):
            with self.assertRaisesRegex(cf.Untranslatable, 'messages'):
                translated(CHAT, messages=messages)

    def test_odd_shapes_break_nothing(self):
        odd = [None, 5, 'x', [], {}, [[]], {'type': ['x']}, [{'type': {}}], True]
        for name in ('system', 'tools', 'tool_choice', 'thinking', 'output_config', 'metadata',
                     'stop_sequences', 'mcp_servers',
                     'max_tokens', 'temperature', 'output_format'):
            for value in (*odd, [{'name': []}], [
                    {'name': 'x', 'input_schema': {'properties': [], 'anyOf': 5, '$ref': {}}}]):
                for target in (CHAT, PLATFORM, CODEX):
                    with contextlib.suppress(cf.Untranslatable):
                        translated(target, **{name: value})
        for block in ('text', 'image', 'document', 'tool_use', 'tool_result', 'thinking',
                      'search_result', 'web_search_tool_result'):
            for value in odd:
                fields = {name: value for name in ('text', 'source', 'id', 'name', 'input',
                                                   'tool_use_id', 'content', 'signature', 'title')}
                for role in ('user', 'assistant', 'system'):
                    messages = [{'role': role, 'content': [{**fields, 'type': block}]},
                                {'role': 'user', 'content': 'x'}]
                    for target in (CHAT, PLATFORM, CODEX, LOCAL):
                        translated(target, messages=messages)

    def test_tokens_are_estimated_from_text_tools_and_media_not_from_their_bytes(self):
        text = cf.estimate_tokens(
            messages_body(messages=[{'role': 'user', 'content': 'word ' * 1000}]))
        self.assertTrue(1250 <= text <= 1500, text)
        wide = cf.estimate_tokens(
            messages_body(messages=[{'role': 'user', 'content': '\u4e16' * 1000}]))
        self.assertTrue(1000 <= wide <= 1200, wide)
        image = {'type': 'image', 'source': {**PNG, 'data': 'A' * 1_000_000}}
        self.assertTrue(1600 <= cf.estimate_tokens(
            {'messages': [{'role': 'user', 'content': [image]}]}) <= 1900)
        document = {'type': 'document', 'source': {**PDF, 'data': 'A' * 131_072}}
        self.assertTrue(4000 <= cf.estimate_tokens(
            {'messages': [{'role': 'user', 'content': [document]}]}) <= 4500)
        self.assertGreater(cf.estimate_tokens({'messages': [], 'tools': [WEATHER] * 10}), 200)


# ==============================================================================
# Response translation
# ==============================================================================


def answer_of(data, target=CHAT, size=None, **changes):
    """The TranslatedStream that has read these bytes, and the events that it gave."""
    conversation = cf.read_conversation(messages_body(tools=[WEATHER], **changes))
    answer = cf.answer_stream(conversation, target, 'msg_1')
    events = [event for piece in pieces(data, size or len(data)) for event in answer.read(piece)]
    return answer, events + answer.read_end()


def content_of(data, target=CHAT, **changes):
    """(content, stop reason) of the message that a translated answer adds up to."""
    answer, events = answer_of(data, target, **changes)
    message = cf.message_from_events(events)
    return message['content'], message['stop_reason']


def text_block(text):
    return {'type': 'text', 'text': text}


def thinking_block(text, seal='cfo0:'):
    return {'type': 'thinking', 'thinking': text, 'signature': seal}


def item_done(index, item):
    return {'type': 'response.output_item.done', 'output_index': index, 'item': item}


def function_call(id, arguments='{}', name='get_weather'):
    return {'type': 'function_call', 'call_id': id, 'name': name, 'arguments': arguments}


SHOWN = {'thinking': {'type': 'adaptive'}}


class ResponseTranslationTest(unittest.TestCase):
    maxDiff = None

    def test_events_are_cut_out_of_bytes_however_they_come(self):
        data = (b': comment\n\ndata: {"a":1}\n\nevent: x\ndata:one\ndata: two\n\n\n\nid: 5\n\n'
                b'data: \xe4\xb8\x96\n\ndata: last')
        for newline in (b'\n', b'\r\n', b'\r'):
            for size in (1, 2, 3, 7, 1000):
                parser = cf.SseParser()
                found = [text for piece in pieces(data.replace(b'\n', newline), size)
                         for text in parser.feed(piece)]
                self.assertEqual(found + parser.end(), ['{"a":1}', 'one\ntwo', '\u4e16', 'last'])

    def test_an_event_without_an_end_is_not_kept_for_ever(self):
        parser = cf.SseParser()
        with mock.patch.object(cf, 'MAX_BODY_BYTES', 1000), self.assertRaises(cf.UpstreamCut):
            for _ in range(3):
                parser.feed(b'x' * 600)

    def test_the_events_of_a_text(self):
        answer, events = answer_of(chat_stream({'content': 'hel'}, {'content': 'lo'}))
        start = {'id': 'msg_1', 'type': 'message', 'role': 'assistant', 'model': OPUS,
                 'content': [], 'stop_reason': None, 'stop_sequence': None, 'usage': cf.NO_USAGE}
        delta = {'type': 'content_block_delta', 'index': 0}
        self.assertEqual(events, [{'type': 'message_start', 'message': start},
                                  {'type': 'content_block_start', 'index': 0,
                                   'content_block': {'type': 'text', 'text': ''}},
                                  {**delta, 'delta': {'type': 'text_delta', 'text': 'hel'}},
                                  {**delta, 'delta': {'type': 'text_delta', 'text': 'lo'}},
                                  {'type': 'content_block_stop', 'index': 0},
                                  {'type': 'message_delta',
                                   'delta': {'stop_reason': 'end_turn', 'stop_sequence': None},
                                   'usage': USAGE}, {'type': 'message_stop'}])
        self.assertEqual((answer.opened_by, answer.stopped, answer.failure),
                         ('content_block_start', True, None))
        self.assertEqual(answer.feed(b'data: {"choices":[{"delta":{"content":"more"}}]}\n\n'), b'')

    def test_nothing_is_told_before_the_first_content(self):
        answer, events = answer_of(chat_stream(finish=None, usage=None, is_done=False))
        self.assertEqual((events, answer.opened_by, answer.stopped), ([], None, False))

    def test_chat_streams_of_every_vendor(self):
        call = tool_use('call_1', city='Rome')
        header = call_delta(0, 'call_1', 'get_weather')
        two = [tool_use('call_1', a=1), tool_use('call_2', a=2)]
        for name, data, expected in (
                ('text then tool',
                 chat_stream({'content': 'a'}, header, call_delta(0, arguments='{"city":'),
                             call_delta(0, arguments='"Rome"}'), finish='tool_calls'),
                 ([text_block('a'), call], 'tool_use')),
                ('tool then text', chat_stream(header, call_delta(0, arguments='{"city":"Rome"}'),
                                               {'content': 'b'}, finish='tool_calls'),
                 ([call, text_block('b')], 'tool_use')),
                ('text among arguments',
                 chat_stream(header, call_delta(0, arguments='{"city":'), {'content': 'b'},
                             call_delta(0, arguments='"Rome"}')),
                 ([call, text_block('b')], 'tool_use')),
                ('interleaved',
                 chat_stream(call_delta(0, 'call_1', 'get_weather'),
                             call_delta(1, 'call_2', 'get_weather'),
                             call_delta(1, arguments='{"a"'), call_delta(0, arguments='{"a":1'),
                             call_delta(1, arguments=':2}'), call_delta(0, arguments='}')),
                 (two, 'tool_use')),
                ('one index for all',
                 chat_stream(call_delta(0, 'call_1', 'get_weather', '{"a":1}'),
                             call_delta(0, 'call_2', 'get_weather', '{"a":2}')),
                 (two, 'tool_use')),
                ('no index', chat_stream({'tool_calls': [{'id': 'call_1', 'function': {
                    'name': 'get_weather',
                    'arguments': '{"a":1}'}}]}, {'tool_calls': [{'id': 'call_2', 'function': {
                        'name': 'get_weather', 'arguments': {'a': 2}}}]}), (two, 'tool_use')),
                ('header repeated', chat_stream(*(call_delta(0, 'call_1', 'get_weather', part)
                                                  for part in ('{"city":', '"Rome"}'))),
                 ([call], 'tool_use')),
                ('arguments first', chat_stream(call_delta(0, arguments='{"city":'),
                                                call_delta(0, 'call_1', 'get_weather', '"Rome"}')),
                 ([call], 'tool_use')),
                ('older form',
                 chat_stream({'function_call': {'name': 'get_weather', 'arguments': '{"city":'}},
                             {'function_call': {'arguments': '"Rome"}'}}, finish='function_call'),
                 ([{**call, 'id': 'toolu_10'}], 'tool_use')),
                ('no arguments', chat_stream(header, finish='tool_calls'),
                 ([tool_use('call_1')], 'tool_use')),
                ('no name', chat_stream(call_delta(0, 'call_1', arguments='{}'), {'content': 'a'},
                                        finish='tool_calls'), ([text_block('a')], 'end_turn')),
                ('odd id', chat_stream(call_delta(0, 'functions.x:0', 'get_weather', '{}')),
                 ([tool_use('functions_x_0')], 'tool_use')),
                ('no finish but done', chat_stream({'content': 'a'}, finish=None),
                 ([text_block('a')], 'end_turn')),
                ('finish but no done', chat_stream({'content': 'a'}, is_done=False),
                 ([text_block('a')], 'end_turn')),
                ('length', chat_stream({'content': 'a'}, finish='length'),
                 ([text_block('a')], 'max_tokens')),
                ('filter', chat_stream({'content': 'a'}, finish='content_filter'),
                 ([text_block('a')], 'refusal')),
                ('refusal', chat_stream({'refusal': 'I will'}, {'refusal': ' not'}),
                 ([text_block('I will not')], 'refusal')),
                ('tool_calls without one', chat_stream({'content': 'a'}, finish='tool_calls'),
                 ([text_block('a')], 'end_turn')),
                ('unknown finish', chat_stream({'content': 'a'}, finish='eos'),
                 ([text_block('a')], 'end_turn')),
                ('stop, in Claude\'s words', chat_stream({'content': 'a'}, finish='stop_sequence'),
                 ([text_block('a')], 'end_turn')),
                ('nothing', chat_stream(), ([], 'end_turn')),
                ('parts', chat_stream({'content': [{'type': 'text', 'text': 'a'},
                                                   {'type': 'text', 'text': 'b'}]}),
                 ([text_block('ab')], 'end_turn')),
                ('content after the finish', chat_stream({'content': 'a'})
                 + b'data: {"choices":[{"delta":{"content":"b"}}]}\n\n',
                 ([text_block('a')], 'end_turn')),
                ('second choice', b'data: {"choices":[{"index":1,"delta":{"content":"b"}}]}\n\n'
                 + chat_stream({'content': 'a'}), ([text_block('a')], 'end_turn'))):
            with self.subTest(name):
                self.assertEqual(content_of(data), expected)

    def test_calls_without_an_id_get_one_each(self):
        content, _ = content_of(chat_stream(call_delta(0, None, 'get_weather', '{}'),
                                            call_delta(1, None, 'get_weather', '{}')))
        self.assertEqual(len({block['id'] for block in content}), 2)

    def test_no_two_calls_share_an_id(self):
        calls = [call_delta(place, id, 'get_weather', '{}')
                 for place, id in enumerate(('a.1', 'a:1', 'a_1'))]
        content, _ = content_of(chat_stream(*calls))
        self.assertEqual([block['id'] for block in content], ['a_1', 'a_1_2', 'a_1_3'])
        calls = [call_delta(place, id, 'get_weather', '{}')
                 for place, id in enumerate(('a_3', 'a', 'a'))]
        content, _ = content_of(chat_stream(*calls))
        self.assertEqual([block['id'] for block in content], ['a_3', 'a', 'a_3_3'])

    def test_nothing_follows_the_end(self):
        call = item_done(1, function_call('call_1'))
        failed = {'type': 'response.failed',
                  'response': {'error': {'code': 'server_error', 'message': 'no'}}}
        for events, changes, end in (([text_delta('a STOP b'), call, completed()],
                                      {'stop_sequences': ['STOP']}, 'message_stop'),
                                     ([text_delta('a'), failed, call, completed()], {}, 'error')):
            for size in (None, 10):
                answer, told = answer_of(responses_stream(*events), PLATFORM, size, **changes)
                self.assertEqual(told[-1]['type'], end)
                self.assertNotIn('tool_use', json.dumps(told))

    def test_text_that_only_looked_like_a_stop_comes_before_the_call_that_follows_it(self):
        data = chat_stream({'content': 'see <'}, call_delta(0, 'call_1', 'get_weather', '{}'))
        self.assertEqual(content_of(data, stop_sequences=['</x>'])[0],
                         [text_block('see <'), tool_use('call_1')])

    def test_what_a_response_repeats_at_its_end_is_not_said_twice(self):
        said = {'type': 'message', 'content': [{'type': 'output_text', 'text': 'a'}]}
        bare = [{'type': 'response.output_text.delta', 'delta': 'a'},
                {'type': 'response.output_item.done', 'item': function_call('call_1')}]
        self.assertEqual(
            content_of(responses_stream(*bare, completed(said, function_call('call_1'))),
                       PLATFORM)[0], [text_block('a'), tool_use('call_1')])

    def test_a_response_that_ends_early_for_any_reason_is_no_finished_call(self):
        added = {'type': 'response.output_item.added', 'output_index': 0,
                 'item': function_call('call_1', '')}
        half = {'type': 'response.function_call_arguments.delta', 'output_index': 0,
                'delta': '{"a":'}
        for reason in ('steered', 'max_messages', 'other', None):
            end = {'type': 'response.incomplete',
                   'response': {'incomplete_details': {'reason': reason}}}
            self.assertEqual(content_of(responses_stream(added, half, end), PLATFORM)[1],
                             'max_tokens')

    def test_numbers_that_are_no_json_do_not_reach_the_client(self):
        self.assertEqual(content_of(chat_stream(
            call_delta(0, 'call_1', 'get_weather', '{"a":1e999}')))[0], [tool_use('call_1')])
        bare = content_of(chat_stream(call_delta(0, 'call_1', 'get_weather', '{"a":"x\n"}')))[0]
        self.assertEqual(bare, [tool_use('call_1', a='x\n')])

    def test_reasoning_is_shown_where_it_was_asked_for_and_is_never_text(self):
        for field, value in (('reasoning_content', 'hm'), ('reasoning', 'hm'),
                             ('reasoning_details', [{'type': 'reasoning.text', 'text': 'hm'}])):
            data = chat_stream({field: value}, {'content': 'a'})
            self.assertEqual(content_of(data, **SHOWN)[0], [thinking_block('hm'), text_block('a')])
            for changes in ({}, {'thinking': {'type': 'disabled'}},
                            {'thinking': {'type': 'adaptive', 'display': 'omitted'}}):
                self.assertEqual(content_of(data, **changes)[0], [text_block('a')])

    def test_long_tool_names_come_back_whole(self):
        name = 'mcp__' + 'x' * 80
        data = chat_stream(call_delta(0, 'call_1', cf.short_name(name), '{}'))
        conversation = cf.read_conversation(messages_body(tools=[{**WEATHER, 'name': name}]))
        answer = cf.answer_stream(conversation, CHAT, 'msg_1')
        self.assertEqual(cf.message_from_events(answer.read(data))['content'],
                         [tool_use('call_1', name)])

    def test_half_a_call_at_the_limit_is_told_as_such(self):
        data = chat_stream(call_delta(0, 'call_1', 'get_weather', '{"city": "Ro'), finish='length')
        answer, events = answer_of(data)
        self.assertEqual([e['delta']['partial_json'] for e in events
                          if e['type'] == 'content_block_delta'], ['{"city": "Ro'])
        self.assertEqual(content_of(data), ([tool_use('call_1')], 'max_tokens'))

    def test_it_is_read_as_a_stream_of_claude_is(self):
        def public(stream):
            return {name for name in dir(stream) if not name.startswith('_')}
        native = cf.MessageStream()
        for target in (CHAT, PLATFORM):
            answer, _ = answer_of(b'', target, size=1)
            self.assertEqual(public(answer) ^ public(native), {'read', 'read_end', 'read_whole'})
            self.assertEqual((answer.sends_pings, answer.can_be_carried,
                              answer.can_be_asked_whole), (False, False, True))
        self.assertEqual((native.sends_pings, native.can_be_carried, native.can_be_asked_whole),
                         (True, True, False))

    def test_a_done_that_a_cut_follows_is_no_end(self):
        data = chat_stream({'content': 'a'}, finish=None)
        for is_cut, is_whole in ((True, False), (False, True)):
            answer = cf.answer_stream(cf.read_conversation(messages_body()), CHAT, 'msg_1')
            answer.read(data)
            self.assertFalse(answer.is_over)
            answer.read_end(is_cut)
            self.assertEqual(answer.stopped, is_whole)

    def test_a_stream_that_ends_early_has_no_end(self):
        for data, target in ((chat_stream({'content': 'a'}, finish=None, is_done=False), CHAT),
                             (chat_stream(call_delta(0, 'c', 'get_weather', '{"a"'), finish=None,
                                          is_done=False), CHAT),
                             (responses_stream(text_delta('a')), PLATFORM)):
            answer, events = answer_of(data, target)
            self.assertEqual((answer.stopped, answer.failure), (False, None))
            self.assertNotIn('message_delta', [event['type'] for event in events])

    def test_an_error_inside_a_stream_is_its_end(self):
        error = {'message': 'Rate limit reached', 'code': 'rate_limit_exceeded'}
        chat = chat_stream({'content': 'a'}, finish=None, is_done=False)
        for data, target in ((chat + f'data: {json.dumps({"error": error})}\n\n'
                              f'data: [DONE]\n\n'.encode(), CHAT),
                             (responses_stream(text_delta('a'), {'type': 'response.failed',
                                                                 'response': {'error': error}},
                                               completed()), PLATFORM),
                             (responses_stream(text_delta('a'), {'type': 'error', **error}),
                              PLATFORM),
                             (responses_stream(text_delta('a'), {'type': 'response.error',
                                                                 'error': error}), PLATFORM)):
            answer, events = answer_of(data, target)
            self.assertEqual(events[-1], {'type': 'error', 'error': {
                'type': 'rate_limit_error', 'message': 'Rate limit reached'}})
            self.assertEqual((answer.failure['code'], answer.failure_status, answer.stopped),
                             ('rate_limit_exceeded', 429, False))
        self.assertEqual(answer_of(b'data: {"error":"text"}\n\n')[1][-1]['error'],
                         {'type': 'api_error', 'message': 'text'})

    def test_a_failure_that_says_nothing_is_one_all_the_same(self):
        answer = cf.answer_stream(cf.read_conversation(messages_body()), PLATFORM, 'msg_1')
        answer.read_whole(b'{"status":"failed","error":null}')
        self.assertEqual((answer.failure, answer.failure_status),
                         ({'message': 'the upstream failed'}, 500))

    def test_the_latest_usage_counts_wherever_it_stands(self):
        every = b''.join(
            b'data: %b\n\n' % json.dumps(chat_chunk({'content': 'a'}, usage=usage)).encode()
            for usage in (None, {'prompt_tokens': 1, 'completion_tokens': 1}, CHAT_USAGE))
        for data, usage in ((every + b'data: [DONE]\n\n', USAGE),
                            (b'data: %b\n\ndata: [DONE]\n\n' % json.dumps(
                                chat_chunk({}, 'stop', usage=CHAT_USAGE)).encode(), USAGE)):
            self.assertEqual(answer_of(data)[1][-2]['usage'], usage)

    def test_usage_that_nobody_told_is_estimated(self):
        usage = answer_of(chat_stream({'content': 'a' * 400}, usage=None))[1][-2]['usage']
        self.assertEqual(usage, {**cf.NO_USAGE, 'input_tokens': cf.estimate_tokens(
            messages_body(tools=[WEATHER])), 'output_tokens': 100})

    def test_usage_without_input_is_estimated_too(self):
        usage = answer_of(chat_stream(
            {'content': 'a'}, usage={'prompt_tokens': 0, 'completion_tokens': 3}))[1][-2]['usage']
        self.assertEqual((usage['input_tokens'] > 10, usage['output_tokens']), (True, 3))

    def test_responses_streams(self):
        added = {'type': 'response.output_item.added', 'output_index': 1,
                 'item': function_call('call_1', '')}
        arguments = [{'type': 'response.function_call_arguments.delta', 'output_index': 1,
                      'delta': part} for part in ('{"city":', '"Rome"}')]
        whole = {'type': 'response.function_call_arguments.done', 'output_index': 1,
                 'arguments': '{"city":"Rome"}'}
        rome = function_call('call_1', '{"city":"Rome"}')
        call, said = (tool_use('call_1', city='Rome'),
                      {'type': 'message', 'content': [{'type': 'output_text', 'text': 'a'}]})
        for name, events, expected in (
                ('text', [text_delta('a'), completed()], ([text_block('a')], 'end_turn')),
                ('text and call', [text_delta('a'), added, *arguments, whole, item_done(1, rome),
                                   completed()], ([text_block('a'), call], 'tool_use')),
                ('half in deltas', [added, arguments[0], whole, completed()],
                 ([call], 'tool_use')),
                ('only done', [item_done(0, said), item_done(1, rome), completed()],
                 ([text_block('a'), call], 'tool_use')),
                ('only the end', [completed(said, rome)], ([text_block('a'), call], 'tool_use')),
                ('said twice', [text_delta('a'), item_done(0, said), added, *arguments,
                                item_done(1, rome), item_done(1, rome), completed(said, rome)],
                 ([text_block('a'), call], 'tool_use')),
                ('interleaved',
                 [added, {**added, 'output_index': 2, 'item': function_call('call_2', '')},
                  {**arguments[0], 'output_index': 2},
                  *arguments, {**arguments[1], 'output_index': 2},
                  item_done(2, function_call('call_2', '{"city":"Rome"}')), item_done(1, rome),
                  completed()], ([call, {**call, 'id': 'call_2'}], 'tool_use')),
                ('refusal', [{'type': 'response.refusal.delta', 'output_index': 0, 'delta': 'no'},
                             completed()], ([text_block('no')], 'refusal')),
                ('refusal whole',
                 [{'type': 'response.refusal.done', 'output_index': 0, 'refusal': 'no'},
                  completed()], ([text_block('no')], 'refusal')),
                ('refusal at the end', [completed({'type': 'message', 'content': [
                    {'type': 'refusal', 'refusal': 'no'}]})], ([text_block('no')], 'refusal')),
                ('too long', [text_delta('a'), {'type': 'response.incomplete', 'response': {
                    'incomplete_details': {'reason': 'max_output_tokens'}}}],
                 ([text_block('a')], 'max_tokens')),
                ('filtered', [text_delta('a'),
                              {'type': 'response.incomplete',
                               'response': {'incomplete_details': {'reason': 'content_filter'}}}],
                 ([text_block('a')], 'refusal')),
                ('unknown events',
                 [{'type': 'keepalive'},
                  {'type': 'codex.rate_limits', 'rate_limits': {'limit_reached': False}},
                  text_delta('a'),
                  {'type': 'response.web_search_call.completed', 'output_index': 3}, completed()],
                 ([text_block('a')], 'end_turn'))):
            with self.subTest(name):
                self.assertEqual(content_of(responses_stream(*events), PLATFORM), expected)
        self.assertEqual(answer_of(responses_stream(text_delta('a'), completed()),
                                   PLATFORM)[1][-2]['usage'], USAGE)

    def test_reasoning_items_are_one_block_each_sealed_with_what_may_go_back(self):
        part = {'type': 'response.reasoning_summary_part.added', 'output_index': 0}
        summary = {'type': 'response.reasoning_summary_text.delta', 'output_index': 0}
        item = {'type': 'reasoning', 'summary': [{'type': 'summary_text', 'text': 'one'},
                                                 {'type': 'summary_text', 'text': 'two'}],
                'encrypted_content': 'gAAA'}
        parts = [part, {**summary, 'delta': 'on'}, {**summary, 'delta': 'e'}, part,
                 {**summary, 'delta': 'two'}]
        sealed = thinking_block('one\n\ntwo', 'cfo1:gAAA')
        for events in ([*parts, item_done(0, item)], [item_done(0, item)]):
            data = responses_stream(*events, text_delta('a', 1), completed())
            self.assertEqual(content_of(data, CODEX, **SHOWN)[0], [sealed, text_block('a')])
            omitted = {'thinking': {'type': 'adaptive', 'display': 'omitted'}}
            self.assertEqual(content_of(data, CODEX, **omitted)[0],
                             [thinking_block('', 'cfo1:gAAA'), text_block('a')])
            self.assertEqual(content_of(data, CODEX)[0], [text_block('a')])
        early = responses_stream({'type': 'response.output_item.added', 'output_index': 0,
                                  'item': {**item, 'encrypted_content': 'early'}},
                                 item_done(0, {**item, 'encrypted_content': None}),
                                 text_delta('a', 1), completed())
        self.assertEqual(content_of(early, CODEX, **SHOWN)[0][0]['signature'], 'cfo0:')

    def test_a_limit_that_codex_tells_is_an_error(self):
        answer, _ = answer_of(responses_stream({'type': 'codex.rate_limits', 'rate_limits': {
            'limit_reached': True, 'primary': {'reset_after_seconds': 60}}}), CODEX)
        self.assertEqual((answer.failure['code'], answer.failure['resets_in_seconds']),
                         ('usage_limit_reached', 60))

    def test_plain_answers_are_read_by_the_same_rules(self):
        call = {'id': 'call_1', 'function': {'name': 'get_weather', 'arguments': ''}}
        message = {'content': [{'type': 'text', 'text': 'a'}], 'reasoning_content': 'hm',
                   'tool_calls': [call, {**call, 'id': 'call_2'}]}
        whole = {'choices': [{'message': message, 'finish_reason': 'tool_calls'}],
                 'usage': CHAT_USAGE}
        response = {'object': 'response', **completed(
            {'type': 'reasoning', 'summary': [{'text': 'hm'}]},
            {'type': 'message', 'content': [{'type': 'output_text', 'text': 'a'}]},
            function_call('call_1', ''), function_call('call_2', 'broken {'))['response']}
        for target, body in ((CHAT, whole), (PLATFORM, response)):
            conversation = cf.read_conversation(messages_body(**SHOWN))
            answer = cf.answer_stream(conversation, target, 'msg_1')
            message = cf.message_from_events(answer.read_whole(json.dumps(body).encode()))
            self.assertEqual(message,
                             {'id': 'msg_1', 'type': 'message', 'role': 'assistant', 'model': OPUS,
                              'stop_reason': 'tool_use', 'stop_sequence': None, 'usage': USAGE,
                              'content': [thinking_block('hm'), text_block('a'),
                                          tool_use('call_1'), tool_use('call_2')]})
        for target, data in ((CHAT, b'<html>'), (CHAT, b'{"choices":[]}'), (CHAT, b'{}'),
                             (PLATFORM, b'{}'), (PLATFORM, b'[]'),
                             (PLATFORM, b'{"status":"in_progress","output":[]}'),
                             (PLATFORM, b'{"status":"cancelled","output":[]}')):
            answer = cf.answer_stream(cf.read_conversation(messages_body()), target, 'msg_1')
            with self.assertRaises(ValueError):
                answer.read_whole(data)

    def test_stop_sequences_that_a_model_does_not_take_are_watched_for_here(self):
        for size in (1, 2, 5):
            for text, stops, content, stop in (('one STOP two', ['STOP'], 'one ', 'STOP'),
                                               ('one STO two', ['STOP'], 'one STO two', None),
                                               ('ab', ['b', 'ab'], '', 'ab'),
                                               ('xxSTSTOPyy', ['STOP'], 'xxST', 'STOP'),
                                               ('ends STO', ['STOP'], 'ends STO', None)):
                data = chat_stream(*({'content': part} for part in pieces(text, size)))
                answer, events = answer_of(data, stop_sequences=stops)
                message = cf.message_from_events(events)
                self.assertEqual(''.join(block['text'] for block in message['content']), content)
                self.assertEqual((message['stop_reason'], message['stop_sequence']),
                                 ('stop_sequence', stop) if stop else ('end_turn', None))
        watched = {target.model: cf.stops_to_watch(cf.read_conversation(
            messages_body(stop_sequences=['x'])), target) for target in (CHAT, LOCAL)}
        self.assertEqual(watched, {'gpt-5.4': ('x',), 'llama': ()})

    def test_odd_chunks_and_events_break_nothing(self):
        odd = [None, 5, 'x', [], {}, [[]], {'a': 1}, [{}], True, ['x'], -1]
        for value in odd:
            for field in ('choices', 'usage', 'error', 'delta', 'finish_reason', 'index',
                          'tool_calls', 'function', 'id', 'name', 'arguments', 'content',
                          'refusal', 'function_call', 'reasoning_content', 'reasoning_details'):
                call = {'index': 0, 'id': 'c',
                        'function': {'name': 'n', 'arguments': '{}', field: value}, field: value}
                chunk = {'choices': [{'index': 0, 'delta': {'tool_calls': [call], field: value},
                                      field: value}], field: value}
                answer_of(f'data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n'.encode(), **SHOWN)
                with contextlib.suppress(ValueError):
                    cf.answer_stream(cf.read_conversation(messages_body()), CHAT,
                                     'msg_1').read_whole(json.dumps({**chunk, 'choices': [
                                         {'message': {'tool_calls': [call], field: value},
                                          field: value}]}).encode())
            for type in (*cf.RESPONSES_EVENTS, None, [], {}):
                for item in ('reasoning', 'function_call', 'message', value):
                    fields = {name: value for name in (
                        'output_index', 'item_id', 'delta', 'arguments', 'call_id', 'name',
                        'error', 'text', 'summary', 'encrypted_content', 'content', 'code',
                        'message', 'rate_limits')}
                    event = {**fields, 'type': type, 'item': {**fields, 'type': item},
                             'response': {'output': [{**fields, 'type': item}, value],
                                          'usage': value, 'incomplete_details': value,
                                          'error': value}}
                    answer_of(f'data: {json.dumps(event)}\n\n'.encode(), CODEX, **SHOWN)
        answer_of(b'data: [1]\n\ndata: nonsense\n\ndata: \xff\n\n')


# ==============================================================================
# Generated answers
# ==============================================================================
# An answer is made at random, written as OpenAI's servers and their many likenesses write it,
# cut into pieces at random, and must come out as it was made.

#: The parts of an answer, in its order.  A Thought's parts are those of a summary.
Said = namedtuple('Said', 'text')
Thought = namedtuple('Thought', 'parts payload')
Called = namedtuple('Called', 'id name arguments')       # arguments: JSON text

SNIPPETS = ('Hello ', 'wörld ', '漢字', '🙂', '👩‍💻 ', '"quoted" ', 'back\\slash', '\n', '\r\n', '\t',
            ' ', '{"a": [', '}}', 'data: [DONE]\n\n', 'event: error\n', '\u2028', '\x00',
            '</think>', ': ping', '0')
TOOL_NAMES = ('Read', 'mcp__files__read', 'n' * 70, 'n' * 70 + 'x', 'names.with dots', 'ünï',
              'mcp__' + 'long_' * 12 + 'one', 'mcp__' + 'long_' * 12 + 'two')
IN_FULL, HIDDEN = {'type': 'adaptive'}, None
SEALED = {'type': 'enabled', 'budget_tokens': 4000, 'display': 'omitted'}


def random_text(rng, least=1):
    return ''.join(rng.choice(SNIPPETS) for _ in range(rng.randint(least, 6)))


def random_value(rng, depth=2):
    kind = rng.randrange(8 if depth else 5)
    if kind < 5:
        number = rng.randint(-10 ** 6, 10 ** 18)
        return (random_text(rng, 0), number, number / 1024, number % 2 == 0, None)[kind]
    if kind == 5:
        return [random_value(rng, depth - 1) for _ in range(rng.randrange(3))]
    return random_object(rng, depth - 1)


def random_object(rng, depth=2):
    return {random_text(rng, 0): random_value(rng, depth)
            for _ in range(rng.choice((0, 1, 1, 2, 3)))}


def random_json(rng, value):
    """JSON as one or another writes it."""
    separators = rng.choice((None, (',', ':'), (', ', ':')))
    return json.dumps(value, ensure_ascii=rng.random() < 0.5, separators=separators)


def snipped(rng, text, most=6):
    """A text in up to `most` pieces; now and then one is empty."""
    places = sorted(rng.randint(0, len(text)) for _ in range(rng.randrange(most)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)])]


def byte_pieces(rng, data):
    places = [0]
    while places[-1] < len(data):
        places.append(places[-1] + rng.randint(1, 50))
    return [data[start:end] for start, end in zip(places, places[1:])]


ODD_VALUES = (None, 7, -1, 1.5, True, 'x', '', [], {}, [None], [{}], {'a': {}})


def places_of(value, place=()):
    """The path to each value within some JSON."""
    inner = (value.items() if isinstance(value, dict) else enumerate(value)
             if isinstance(value, list) else ())
    found = [place] if place else []
    for name, part in inner:
        found += places_of(part, (*place, name))
    return found


def replaced(value, place, new):
    if not place:
        return new
    changed = copy.copy(value)
    changed[place[0]] = replaced(value[place[0]], place[1:], new)
    return changed


class MadeAnswer:
    """A random answer, and what a client should see of it."""

    def __init__(self, rng, can_be_cut=True):
        self.thinking = rng.choice((IN_FULL, IN_FULL, HIDDEN, SEALED))
        self.ending = rng.choice(('end',) * 8 + ('length', 'content_filter'))
        kinds = rng.choices('tttcccr', k=rng.choice((1, 1, 2, 3, 4, 6)))
        self.items = [self.random_item(rng, kind, place) for place, kind in enumerate(kinds)]
        last = self.items[-1]
        #: Whether the limit fell into a call's arguments.
        self.is_cut = self.ending == 'length' and isinstance(last, Called) and can_be_cut
        if self.is_cut:
            self.items[-1] = last._replace(
                arguments=last.arguments[:rng.randrange(1, len(last.arguments))])
        self.prompt, self.output = rng.randint(100, 9999), rng.randint(1, 999)
        self.cached, self.written = (rng.choice((0, rng.randint(1, 50))) for _ in range(2))
        self.reasoned = rng.choice((0, rng.randint(1, 50)))

    def random_item(self, rng, kind, place):
        if kind == 't':
            return Said(random_text(rng))
        if kind == 'r':
            payload = rng.choice((None, f'gAAAA{place}=='))
            return Thought([random_text(rng) for _ in range(rng.choice((0, 1, 1, 2, 3)))], payload)
        id = rng.choice((f'call_{place}', f'toolu_01{place}', f'functions.Read:{place}',
                         f'c{place}' * 40))
        return Called(id, rng.choice(TOOL_NAMES), random_json(rng, random_object(rng)))

    @property
    def calls(self):
        return [item for item in self.items if isinstance(item, Called)]

    def conversation(self, **changes):
        """The request that this answers, read."""
        tools = [{'name': name, 'input_schema': {'type': 'object'}} for name in TOOL_NAMES]
        body = {'model': OPUS, 'max_tokens': 100, 'messages': [{'role': 'user', 'content': 'hi'}],
                'tools': tools}
        thinking = {'thinking': self.thinking} if self.thinking else {}
        return cf.read_conversation({**body, **thinking, **changes})

    def stream(self, wire, **changes):
        target = cf.Target(wire, 'https://example.com', 'gpt-5.4')
        return cf.answer_stream(self.conversation(**changes), target,
                                'msg_0123456789abcdef01234567')

    # -- what a client should see ---------------------------------------------------

    def blocks(self, wire):
        """The content, as it should come of a stream that tells one item after the other."""
        found = []
        for item in self.items:
            block = self.block(item, wire)
            if (block and found and block['type'] == found[-1]['type']
                and (block['type'] == 'text' or block['type'] == 'thinking'
                     and wire == cf.CHAT_COMPLETIONS)):
                found[-1][block['type']] += block[block['type']]
            elif block:
                found.append(block)
        return found

    def block(self, item, wire):
        if isinstance(item, Said):
            return {'type': 'text', 'text': item.text}
        if isinstance(item, Called):
            is_cut = self.is_cut and item is self.items[-1]
            return {'type': 'tool_use', 'id': re.sub('[^A-Za-z0-9_-]', '_', item.id),
                    'name': item.name, 'input': {} if is_cut else json.loads(item.arguments)}
        if self.thinking is HIDDEN:
            return None
        payload = item.payload if wire == cf.RESPONSES else None
        text = '\n\n'.join(item.parts) if self.thinking is IN_FULL else ''
        signature = 'cfo1:' + payload if payload else 'cfo0:'
        return ({'type': 'thinking', 'thinking': text, 'signature': signature} if text or payload
                else None)

    @property
    def stop_reason(self):
        if self.ending != 'end':
            return {'length': 'max_tokens', 'content_filter': 'refusal'}[self.ending]
        return 'tool_use' if self.calls else 'end_turn'

    @property
    def usage(self):
        fresh = self.prompt - self.cached - self.written
        told = {'input_tokens': fresh, 'cache_creation_input_tokens': self.written,
                'cache_read_input_tokens': self.cached, 'output_tokens': self.output}
        if self.reasoned:
            told['output_tokens_details'] = {'thinking_tokens': self.reasoned}
        return told

    def openai_usage(self, input, output):
        details = {'cached_tokens': self.cached, 'cache_write_tokens': self.written}
        return {f'{input}_tokens': self.prompt, f'{output}_tokens': self.output,
                'total_tokens': self.prompt + self.output, f'{input}_tokens_details': details,
                f'{output}_tokens_details': {'reasoning_tokens': self.reasoned}}


def text_of(blocks, kind):
    return ''.join(block[kind] for block in blocks if block['type'] == kind)


def calls_of(blocks, is_ordered=True):
    calls = [block for block in blocks if block['type'] == 'tool_use']
    return calls if is_ordered else sorted(calls, key=lambda call: call['id'])


#: The data of a stream's events; from the end of `closing` on the message is whole.  is_exact: one
#: item comes after the other; is_ordered: at least each call's name comes before the next call.
Written = namedtuple('Written', 'data closing is_exact is_ordered')


def in_turns(rng, lanes):
    """What several lanes hold, each in its order, told at random in between; a lane begins only
    after the one ahead of it did."""
    waiting, running, found = [list(lane) for lane in lanes if lane], [], []
    while waiting or running:
        if waiting and (not running or rng.random() < 0.3):
            running.append(waiting.pop(0))
            lane = running[-1]
        else:
            lane = rng.choice(running)
        found.append(lane.pop(0))
        running = [lane for lane in running if lane]
    return found


class ChatWriter:
    """Writes a MadeAnswer as a stream of Chat Completions, in one server's manner."""

    def __init__(self, rng, made):
        self.rng, self.made = rng, made
        self.mixing = rng.choice(('none', 'none', 'calls', 'all'))
        self.repeats = rng.choice(('never', 'never', 'always', 'empty'))
        self.thinking = rng.choice(('reasoning_content', 'reasoning', 'reasoning_details'))
        #: Calls with an index as OpenAI's; with 0 for each; without, and with an id at their
        #: beginning ('header'), or each in one chunk ('whole').
        self.form = rng.choice(('index',) * 6 + ('zero', 'header', 'whole'))
        self.form = self.form if self.mixing == 'none' else 'index'
        self.is_late = self.form == 'index' and self.repeats != 'always' and rng.random() < 0.3
        self.has_done = rng.random() < 0.7
        self.usage_place = rng.choice(('chunk', 'finish', 'all'))
        self.is_exact, self.call_count = self.mixing == 'none', 0

    def write(self):
        rng, reason = self.rng, self.finish_reason()
        deltas = ([{'role': 'assistant', 'content': rng.choice((None, ''))}] if rng.random() < 0.8
                  else [])
        chunks = [self.chunk(delta) for delta in deltas + self.all_deltas()]
        if chunks and rng.random() < 0.3:           # the reason comes with the last delta
            chunks[-1]['choices'][0]['finish_reason'] = reason
        else:
            chunks.append(self.chunk({}, reason))
        closing = len(chunks) - 1
        if self.usage_place == 'all':
            for place, chunk in enumerate(chunks):
                chunk['usage'] = {'prompt_tokens': self.made.prompt,
                                  'completion_tokens': place + 1}
        if self.usage_place == 'chunk':
            chunks.append({**self.chunk({}), 'choices': []})
        chunks[-1]['usage'] = self.made.openai_usage('prompt', 'completion')
        if reason and rng.random() < 0.2:           # what comes after it does not count
            chunks.append(self.chunk({'content': 'late',
                                      'tool_calls': [{'index': 9, 'id': 'late'}]}))
        data = [random_json(rng, chunk)
                for chunk in chunks] + (['[DONE]'] if self.has_done else [])
        return Written(data, closing if reason else len(data) - 1, self.is_exact, not self.is_late)

    def finish_reason(self):
        if self.made.ending != 'end':
            return self.made.ending
        if self.has_done and self.rng.random() < 0.1:
            return None
        return self.rng.choice(('tool_calls', 'stop', 'function_call') if self.made.calls
                               else ('stop', 'eos', 'tool_calls'))

    def chunk(self, delta, reason=None):
        return {'id': 'chatcmpl-1', 'object': 'chat.completion.chunk', 'created': 1,
                'model': 'gpt-5.4', 'choices': [{'index': 0, 'delta': delta, 'logprobs': None,
                                                 'finish_reason': reason}], 'usage': None}

    def all_deltas(self):
        lanes = [(item, self.deltas(item)) for item in self.made.items]
        if self.mixing == 'all':                    # all text is one lane, all thinking another
            by_kind = {}
            for place, (item, lane) in enumerate(lanes):
                by_kind.setdefault(place if isinstance(item, Called) else type(item),
                                   []).extend(lane)
            return in_turns(self.rng, by_kind.values())
        found, calls = [], []
        for item, lane in [*lanes, (None, [])]:
            if isinstance(item, Called):
                calls.append(lane)
                continue
            is_mixed = self.mixing == 'calls'
            found += in_turns(self.rng, calls) if is_mixed else itertools.chain.from_iterable(
                calls)
            found += lane
            calls = []
        return found

    def deltas(self, item):
        if isinstance(item, Called):
            return [{'tool_calls': [call]} for call in self.call_deltas(item)]
        if isinstance(item, Said):
            return [{'content': piece} for piece in snipped(self.rng, item.text)]
        pieces = snipped(self.rng, '\n\n'.join(item.parts))
        if self.thinking == 'reasoning_details':
            return [{self.thinking: [{'type': 'reasoning.text', 'text': piece}]}
                    for piece in pieces]
        return [{self.thinking: piece} for piece in pieces]

    def call_deltas(self, call):
        rng, place, name = self.rng, self.call_count, cf.short_name(call.name)
        arguments = call.arguments
        self.call_count += 1
        if arguments == '{}' and rng.random() < 0.5:
            arguments, self.is_exact = '', False    # its end shows only with the answer's
        index = {'index': place, 'zero': 0}.get(self.form)
        index = {} if index is None else {'index': index}
        whole = {**index, 'id': call.id, 'type': 'function',
                 'function': {'name': name, 'arguments': arguments}}
        if self.form == 'whole' or rng.random() < 0.1:
            return [whole]
        found = [{**index, 'function': {'arguments': piece}} for piece in snipped(rng, arguments)]
        if self.repeats == 'always':
            found = [{**whole, **piece, 'function': {'name': name, **piece['function']}}
                     for piece in found]
        elif self.repeats == 'empty':
            found = [{**piece, 'id': rng.choice(('', None)),
                      'function': {'name': '', **piece['function']}} for piece in found]
        header = {**whole, 'function': {'name': name, 'arguments': ''}}
        if not self.is_late:
            return [header, *found]
        halves = [{**index, 'id': call.id, 'function': {'arguments': ''}},
                  {**index, 'function': {'name': name}}]
        rng.shuffle(halves)
        found.insert(0, halves[0])
        found.insert(rng.randint(1, len(found)), halves[1])
        return found

    def write_whole(self):
        """The same as one completion."""
        text = text_of(self.made.blocks(cf.CHAT_COMPLETIONS), 'text')
        message = {'role': 'assistant', 'content': text or None}
        thinking = ''.join('\n\n'.join(item.parts) for item in self.made.items
                           if isinstance(item, Thought))
        message['reasoning_content'] = thinking or None
        calls = [{'id': call.id, 'type': 'function',
                  'function': {'name': cf.short_name(call.name), 'arguments': call.arguments}}
                 for call in self.made.calls]
        message.update({'tool_calls': calls} if calls else {})
        return {'id': 'chatcmpl-1', 'object': 'chat.completion',
                'usage': self.made.openai_usage('prompt', 'completion'),
                'choices': [{'index': 0, 'message': message,
                             'finish_reason': self.finish_reason() or 'stop'}]}


class ResponsesWriter:
    """Writes a MadeAnswer as a stream of Responses, in one server's manner."""

    def __init__(self, rng, made, has_index=True):
        self.rng, self.made = rng, made
        self.has_index = has_index
        self.mixes_calls = rng.random() < 0.2
        #: From this item on, all is said by the last event alone.
        self.silent_from = rng.choice((0, rng.randrange(99), 99, 99))
        self.has_output = self.silent_from < len(made.items) or rng.random() < 0.6
        self.sequence = 0

    def event(self, type, place=None, item_id=None, **fields):
        self.sequence += 1
        told = {'type': f'response.{type}', 'sequence_number': self.sequence}
        told.update({'output_index': place} if place is not None and self.has_index else {})
        told.update({'item_id': item_id} if item_id else {})
        return {**told, **fields}

    def write(self):
        response = {'id': 'resp_1', 'object': 'response', 'status': 'in_progress', 'output': []}
        events = [self.event('created', response=response),
                  self.event('in_progress', response=response)]
        lanes = [self.item_events(place, item) for place, item in enumerate(self.made.items)]
        spoken = list(zip(self.made.items, lanes))[:self.silent_from]
        calls = []
        for item, lane in [*spoken, (None, [])]:
            if isinstance(item, Called) and self.mixes_calls:
                calls.append(lane)
            else:
                events += in_turns(self.rng, calls) + lane
                calls = []
        if self.rng.random() < 0.2:
            events.insert(self.rng.randrange(len(events)),
                          {'type': 'keepalive', 'sequence_number': 0})
        whole = self.write_whole()
        whole['output'] = whole['output'] if self.has_output else self.rng.choice(([], None))
        events.append(self.event(whole['status'], response=whole))
        data = [random_json(self.rng, event) for event in events]
        closing = len(data) - 1
        return Written(data + self.rng.choice(([], [], ['[DONE]'])), closing,
                       not self.mixes_calls, True)

    def write_whole(self):
        """The same as one response."""
        reason = {'length': 'max_output_tokens',
                  'content_filter': 'content_filter'}.get(self.made.ending)
        return {'id': 'resp_1', 'object': 'response',
                'status': 'incomplete' if reason else 'completed',
                'error': None, 'incomplete_details': {'reason': reason} if reason else None,
                'output': [self.item(place, item) for place, item in enumerate(self.made.items)],
                'usage': self.made.openai_usage('input', 'output')}

    def item(self, place, item, status='completed'):
        if isinstance(item, Said):
            content = [{'type': 'output_text', 'text': part, 'annotations': []}
                       for part in in_parts(item.text)]
            return {'id': f'msg_{place}', 'type': 'message', 'role': 'assistant', 'status': status,
                    'content': content}
        if isinstance(item, Thought):
            summary = [{'type': 'summary_text', 'text': part} for part in item.parts]
            return {'id': f'rs_{place}', 'type': 'reasoning', 'summary': summary,
                    'encrypted_content': item.payload}
        return {'id': f'fc_{place}', 'type': 'function_call', 'status': status, 'call_id': item.id,
                'name': cf.short_name(item.name), 'arguments': item.arguments}

    def item_events(self, place, item):
        whole = self.item(place, item)
        is_cut = self.made.is_cut and place == len(self.made.items) - 1
        done = self.event('output_item.done', place, item=whole)
        if self.rng.random() < 0.2 and not is_cut:
            return [done]
        if isinstance(item, Said):
            empty, found = {'content': []}, self.part_events(
                place, whole, 'content', 'output_text', 'content_part', 'content_index')
        elif isinstance(item, Thought):
            empty = {'summary': [], 'encrypted_content': item.payload and 'gAAAAbegun'}
            found = self.part_events(place, whole, 'summary', 'reasoning_summary_text',
                                     'reasoning_summary_part', 'summary_index')
        else:
            empty, found = {'arguments': ''}, self.argument_events(place, whole, is_cut)
        added = self.event('output_item.added', place,
                           item={**whole, **empty, 'status': 'in_progress'})
        return [added, *found] if is_cut else [added, *found, done]

    def part_events(self, place, item, parts, text, part, index):
        """Of each part: the beginning, its text in deltas, and twice its end."""
        found = []
        for number, content in enumerate(item[parts]):
            where = {'place': place, 'item_id': item['id'], index: number}
            found += [self.event(f'{part}.added', **where, part={**content, 'text': ''})]
            found += [self.event(f'{text}.delta', **where, delta=piece)
                      for piece in snipped(self.rng, content['text'])]
            found += [self.event(f'{text}.done', **where, text=content['text']),
                      self.event(f'{part}.done', **where, part=content)]
        return found

    def argument_events(self, place, item, is_cut):
        pieces = snipped(self.rng, item['arguments']) if is_cut or self.rng.random() < 0.8 else []
        deltas = [self.event('function_call_arguments.delta', place, item['id'], delta=piece)
                  for piece in pieces]
        done = self.event('function_call_arguments.done', place, item['id'],
                          arguments=item['arguments'])
        return deltas if is_cut else [*deltas, done]


def in_parts(text):
    """A message's text may have several parts."""
    return [text] if len(text) % 3 else [text[:len(text) // 2], text[len(text) // 2:]]


WRITERS = {cf.CHAT_COMPLETIONS: ChatWriter, cf.RESPONSES: ResponsesWriter}


def sse_bytes(rng, data):
    """(the bytes of a stream of events, where each event's data ends)."""
    newline = rng.choice(('\n', '\n', '\r\n'))
    field, names_events = rng.choice(('data: ', 'data: ', 'data:')), rng.random() < 0.5
    found, ends = b'', []
    for text in data:
        if rng.random() < 0.1:
            found += f': OPENROUTER PROCESSING{newline * rng.choice((1, 2))}'.encode()
        head = f'event: message{newline}' if names_events else ''
        if rng.random() < 0.1 and text != '[DONE]':
            text = json.dumps(json.loads(text), indent=1).replace('\n', newline + field)
        found += f'{head}{field}{text}'.encode()
        ends.append(len(found))
        found += 2 * newline.encode()
    if rng.random() < 0.2:  # the last event without the blank line after it
        found = found[:ends[-1]]
    return found, ends


def written_stream(rng, made, wire):
    """(Written, its bytes, where the data of its events end)"""
    written = WRITERS[wire](rng, made).write()
    return (written, *sse_bytes(rng, written.data))


# ==============================================================================
# Translation, by its properties
# ==============================================================================

EVENT_CODES = {'message_start': 's', 'content_block_start': 'b', 'content_block_delta': 'd',
               'content_block_stop': 'e', 'message_delta': 'm', 'message_stop': 'z', 'error': '!'}
#: Message streams as texts of these codes.
WHOLE, BROKEN, FAILED = r'\As(bd*e)*mz\Z', r'\A(s(bd*e)*(bd*)?)?\Z', r'\A(s(bd*e)*(bd*)?)?!\Z'
DELTA_TYPES = {'text': ('text_delta',), 'thinking': ('thinking_delta', 'signature_delta'),
               'tool_use': ('input_json_delta',)}
UPSTREAM_ERRORS = {
    cf.CHAT_COMPLETIONS: ({'error': {'message': 'Overloaded', 'code': 503}},
                          {'error': 'Overloaded'}),
    cf.RESPONSES: ({'type': 'error', 'code': 'server_error', 'message': 'Overloaded'},
                   {'type': 'error', 'error': {'code': 'server_error', 'message': 'Overloaded'}},
                   {'type': 'response.failed', 'response': {'status': 'failed', 'error': {
                       'code': 'server_error', 'message': 'Overloaded'}}})}
BOTH_WIRES = (cf.CHAT_COMPLETIONS, cf.RESPONSES)


def translated_bytes(stream, byte_pieces):
    return b''.join(map(stream.feed, byte_pieces)) + stream.last()


def strict_events(data):
    """The events in a stream's bytes, where each is nothing but its two lines."""
    blocks = data.decode().split('\n\n')
    found = []
    for block in blocks[:-1]:
        type, event = re.fullmatch(r'event: (\w+)\ndata: ([^\n]+)', block).groups()
        found.append(json.loads(event))
        assert found[-1]['type'] == type and blocks[-1] == '', block
    return found


def folded(events):
    """The message as a client reads it."""
    return json.loads(cf.dump_body(cf.message_from_events(events)))


class TranslationPropertiesTest(unittest.TestCase):
    """What must hold of every translated answer.  A case is told by its seed, which makes it
    again."""

    def check_grammar(self, events, pattern):
        self.assertRegex(''.join(EVENT_CODES[event['type']] for event in events), pattern)
        index, block, deltas = -1, None, 0
        for event in events:
            if event['type'] == 'content_block_start':
                index, block, deltas = index + 1, event['content_block'], 0
                self.assertEqual(block.get(block['type'], {}),
                                 '' if block['type'] != 'tool_use' else {})
                self.assertEqual(block.get('input', {}), {})
            if event['type'].startswith('content_block'):
                self.assertEqual(event['index'], index)
            if event['type'] == 'content_block_delta':
                type, value = event['delta'].values()
                self.assertIn(type, DELTA_TYPES[block['type']])
                self.assertTrue(value)
                deltas += 1
            if event['type'] == 'content_block_stop' and block['type'] != 'tool_use':
                self.assertGreater(deltas, 0)

    def check_message(self, made, wire, events, written, has_usage=True):
        """That a whole message says all that was made, and nothing else."""
        self.check_grammar(events, WHOLE)
        message, wanted = folded(events), made.blocks(wire)
        if written.is_exact:
            self.assertEqual(message['content'], wanted)
        for kind in ('text', 'thinking'):
            self.assertEqual(text_of(message['content'], kind), text_of(wanted, kind))
        self.assertEqual(calls_of(message['content'], written.is_ordered),
                         calls_of(wanted, written.is_ordered))
        told = (message['stop_reason'], message['stop_sequence'], message['model'], message['id'],
                message['role'])
        self.assertEqual(told, (made.stop_reason, None, OPUS, 'msg_0123456789abcdef01234567',
                                'assistant'))
        if has_usage:
            self.assertEqual(message['usage'], made.usage)
        if made.is_cut:
            self.assertIn(made.items[-1].arguments, self.arguments_told(events))

    def arguments_told(self, events):
        """The arguments of each call, as they went out."""
        found = {}
        for event in events:
            if event['type'] == 'content_block_delta' and 'partial_json' in event['delta']:
                found[event['index']] = found.get(event['index'],
                                                  '') + event['delta']['partial_json']
        return list(found.values())

    def check_cases(self, count, check):
        """Calls check(rng, MadeAnswer, wire) for each case."""
        for seed in range(count):
            for wire in BOTH_WIRES:
                rng = random.Random(seed)
                with self.subTest(seed=seed, wire=wire):
                    check(rng, MadeAnswer(rng), wire)

    def test_nothing_of_a_stream_is_lost_changed_or_told_out_of_turn(self):
        def check(rng, made, wire):
            written, data, _ = written_stream(rng, made, wire)
            stream = made.stream(wire)
            events = strict_events(translated_bytes(stream, byte_pieces(rng, data)))
            self.check_message(made, wire, events, written)
            self.assertEqual((stream.stopped, stream.stop_reason, stream.usage, stream.failure),
                             (True, made.stop_reason, made.usage, None))
        self.check_cases(120, check)

    def test_nor_of_an_answer_that_comes_as_one_document(self):
        def check(rng, made, wire):
            document = WRITERS[wire](rng, made).write_whole()
            events = made.stream(wire).read_whole(random_json(rng, document).encode())
            self.check_message(made, wire, events, Written(None, 0, wire == cf.RESPONSES, True))
        self.check_cases(50, check)

    def test_where_the_bytes_are_cut_does_not_matter(self):
        def check(rng, made, wire):
            _, data, _ = written_stream(rng, made, wire)
            single = [data[place:place + 1] for place in range(len(data))]
            messages = [folded(strict_events(translated_bytes(made.stream(wire), cut)))
                        for cut in ([data], byte_pieces(rng, data), single)]
            self.assertEqual(messages[1:], messages[:-1])
        self.check_cases(6, check)

    def test_a_stream_that_breaks_off_looks_whole_only_when_it_is(self):
        def check(rng, made, wire):
            written, data, ends = written_stream(rng, made, wire)
            whole_from = ends[written.closing]
            places = [*ends, *(end - 1 for end in ends),
                      *(rng.randrange(len(data)) for _ in range(10))]
            for place in [whole_from, whole_from - 1, *rng.sample(places, 10)]:
                events = strict_events(translated_bytes(made.stream(wire), [data[:place]]))
                if place < whole_from:
                    self.check_grammar(events, BROKEN)
                else:
                    self.check_message(made, wire, events, written, has_usage=place >= ends[-1])
        self.check_cases(15, check)

    def test_after_an_error_nothing_follows(self):
        def check(rng, made, wire):
            written = WRITERS[wire](rng, made).write()
            place = rng.randint(0, written.closing)
            told = [*written.data[:place], json.dumps(rng.choice(UPSTREAM_ERRORS[wire])),
                    *written.data[place:]]
            stream = made.stream(wire)
            events = strict_events(translated_bytes(stream,
                                                    byte_pieces(rng, sse_bytes(rng, told)[0])))
            self.check_grammar(events, FAILED)
            self.assertEqual(events[-1]['error']['message'], 'Overloaded')
            self.assertEqual((stream.stopped, stream.failure['message']), (False, 'Overloaded'))
        self.check_cases(50, check)

    def test_text_ends_before_the_first_stop_sequence_and_nothing_follows_it(self):
        stops = ['STOP', '\n\nHuman:', '##']
        parts = ('a', 'S', 'ST', 'STO', 'STOP', 'STOPS', '\n', '\n\nHum', '\n\nHuman:', '#',
                 'an: ', '漢')
        for seed in range(30):
            rng = random.Random(seed)
            made = MadeAnswer(rng, can_be_cut=False)
            made.ending, made.thinking, made.items = 'end', HIDDEN, []
            for place in range(rng.randint(1, 3)):
                made.items += [Said(''.join(rng.choice(parts) for _ in range(rng.randint(1, 5)))),
                               Called(f'call_{place}', 'Read', '{"a": 1}')]
            made.items = made.items[:rng.choice((-1, None))]
            for wire in BOTH_WIRES:
                with self.subTest(seed=seed, wire=wire, items=made.items):
                    self.check_stops(rng, made, wire, stops)

    def check_stops(self, rng, made, wire, stops):
        writer = WRITERS[wire](rng, made)
        writer.mixing, writer.mixes_calls = 'none', False
        data, _ = sse_bytes(rng, writer.write().data)
        events = strict_events(translated_bytes(made.stream(wire, stop_sequences=stops),
                                                byte_pieces(rng, data)))
        wanted, hit = [], None
        for block in made.blocks(wire):
            found = re.search('|'.join(stops), block.get('text', ''))
            wanted.append({**block, 'text': block['text'][:found.start()]} if found else block)
            if found:
                hit = found.group()
                break
        message = folded(events)
        self.check_grammar(events, WHOLE)
        self.assertEqual(message['content'],
                         [block for block in wanted if block.get('text') != ''])
        self.assertEqual((message['stop_reason'], message['stop_sequence']),
                         ('stop_sequence', hit) if hit else (made.stop_reason, None))

    # -- servers with manners of their own ------------------------------------------

    def test_calls_without_an_id_get_one_of_their_own(self):
        functions = [{'name': 'Read', 'arguments': f'{{"n": {place}}}'} for place in range(3)]
        numbered = [{'index': place, 'function': function}
                    for place, function in enumerate(functions)]
        plain = [{'function': function} for function in functions]
        empty = [{**call, 'id': ''} for call in numbered]
        rows = {'each in its own chunk': in_chunks([{'tool_calls': [call]} for call in numbered],
                                                   'stop'),
                'all in one chunk': in_chunks([{'tool_calls': numbered}], 'tool_calls'),
                'with empty ids': in_chunks([{'tool_calls': [call]} for call in empty], 'stop'),
                'without an index too': in_chunks([{'tool_calls': plain}], 'tool_calls'),
                'in a document': {
                    'choices': [{'message': {'tool_calls': plain}, 'finish_reason': 'stop'}]}}
        for name, told in rows.items():
            with self.subTest(name):
                events = translate_answer(cf.CHAT_COMPLETIONS, told)
                self.check_grammar(events, WHOLE)
                calls = calls_of(folded(events)['content'])
                self.assertEqual([call['input'] for call in calls], [{'n': 0}, {'n': 1}, {'n': 2}])
                self.assertEqual(len({call['id'] for call in calls}), 3)
                self.assertRegex(' '.join(call['id'] for call in calls),
                                 r'\A(toolu_[A-Za-z0-9_-]+ ?){3}\Z')

    def test_responses_events_without_an_output_index_are_told_apart_by_their_ids(self):
        for seed in range(10):
            rng = random.Random(seed)
            made = MadeAnswer(rng, can_be_cut=False)
            writer = ResponsesWriter(rng, made, has_index=False)
            with self.subTest(seed=seed, items=made.items):
                written = writer.write()
                data, _ = sse_bytes(rng, written.data)
                events = strict_events(translated_bytes(made.stream(cf.RESPONSES), [data]))
                self.check_message(made, cf.RESPONSES, events, written)

    def test_what_came_as_events_is_not_told_again_by_a_last_event_that_counts_otherwise(self):
        search = {'type': 'web_search_call', 'id': 'ws_1', 'status': 'completed'}
        said = {'type': 'message', 'id': 'msg_1',
                'content': [{'type': 'output_text', 'text': 'hi'}]}
        call = {'type': 'function_call', 'id': 'fc_1', 'call_id': 'call_1', 'name': 'Read',
                'arguments': '{"a": 1}'}
        events = [{'type': 'response.output_item.added', 'output_index': 1,
                   'item': {**said, 'content': []}},
                  {'type': 'response.output_text.delta', 'output_index': 1, 'item_id': 'msg_1',
                   'delta': 'hi'},
                  *({'type': 'response.output_item.done', 'output_index': place, 'item': item}
                    for place, item in enumerate([search, said, call]))]
        for name, output in (('nothing is left out', [search, said, call]),
                             ('the search is', [said, call]), ('only the call is told', [call]),
                             ('all is', [])):
            with self.subTest(name):
                last = {'type': 'response.completed',
                        'response': {'status': 'completed', 'output': output}}
                content = folded(translate_answer(cf.RESPONSES, [*events, last]))['content']
                self.assertEqual(content, [{'type': 'text', 'text': 'hi'}, {
                    'type': 'tool_use', 'id': 'call_1', 'name': 'Read', 'input': {'a': 1}}])

    def test_reasoning_of_open_models_is_thinking_however_it_comes(self):
        item = {'type': 'reasoning', 'id': 'rs_1', 'summary': [],
                'content': [{'type': 'reasoning_text', 'text': 'hm'}]}
        said = {'type': 'message', 'id': 'msg_1',
                'content': [{'type': 'output_text', 'text': 'hi'}]}
        done = [{'type': 'response.output_item.done', 'output_index': place, 'item': item}
                for place, item in enumerate([item, said])]
        delta = {'type': 'response.reasoning_text.delta', 'output_index': 0, 'item_id': 'rs_1',
                 'delta': 'hm'}
        response = {'status': 'completed', 'output': [item, said]}
        last = {'type': 'response.completed', 'response': response}
        rows = {'in deltas': [delta, *done, last], 'in its item': [*done, last],
                'at the end': [last], 'whole': response}
        thought = {'type': 'thinking', 'thinking': 'hm', 'signature': 'cfo0:'}
        for name, told in rows.items():
            with self.subTest(name):
                content = folded(translate_answer(cf.RESPONSES, told))['content']
                self.assertEqual(content, [thought, {'type': 'text', 'text': 'hi'}])

    def test_a_call_that_comes_whole_in_its_done_event_after_others_of_no_index_is_whole(self):
        items = [{'type': 'function_call', 'id': f'fc_{n}', 'call_id': f'call_{n}', 'name': 'Read',
                  'arguments': f'{{"n": {n}}}'} for n in range(3)]
        told = [*({'type': 'response.output_item.done', 'item': item} for item in items),
                {'type': 'response.completed', 'response': {'status': 'completed', 'output': []}}]
        calls = calls_of(folded(translate_answer(cf.RESPONSES, told))['content'])
        self.assertEqual([(call['id'], call['input']) for call in calls],
                         [('call_0', {'n': 0}), ('call_1', {'n': 1}), ('call_2', {'n': 2})])

    def test_arguments_that_are_written_otherwise_in_the_end_are_not_told_again(self):
        said = {'type': 'function_call', 'id': 'fc_1', 'call_id': 'call_1', 'name': 'Read',
                'arguments': ''}
        rows = (('{"a":1}', '{"a": 1}'), ('{"a": "\\u00e4"}', '{"a": "ä"}'), ('{"a":1', '{"a":1}'),
                ('', '{"a": 1}'), ('{"a": 1}', ''))
        for first, whole in rows:
            told = [{'type': 'response.output_item.added', 'output_index': 0, 'item': said},
                    {'type': 'response.function_call_arguments.delta', 'output_index': 0,
                     'delta': first},
                    {'type': 'response.function_call_arguments.done', 'output_index': 0,
                     'arguments': whole},
                    {'type': 'response.output_item.done', 'output_index': 0,
                     'item': {**said, 'arguments': whole}},
                    {'type': 'response.completed',
                     'response': {'status': 'completed', 'output': []}}]
            with self.subTest(first=first, whole=whole):
                call, = folded(translate_answer(cf.RESPONSES, told))['content']
                self.assertEqual(call['input'], json.loads(whole or first))

    def test_an_emoji_that_a_server_cut_in_half_is_whole_again(self):
        begun = {'name': 'Read', 'arguments': '{"a": "\ud83d'}
        rows = {'text': [{'content': '\ud83d'}, {'content': '\ude42!'}],
                'arguments': [{'tool_calls': [{'index': 0, 'id': 'call_1', 'function': begun}]}, {
                    'tool_calls': [{'index': 0, 'function': {'arguments': '\ude42!"}'}}]}]}
        for name, deltas in rows.items():
            with self.subTest(name):
                block, = folded(translate_answer(cf.CHAT_COMPLETIONS,
                                                 in_chunks(deltas, 'stop')))['content']
                self.assertEqual(block.get('text') or block['input']['a'], '🙂!')

    def test_no_odd_value_in_a_stream_breaks_the_order_of_events(self):
        for seed in range(60):
            for wire in BOTH_WIRES:
                rng = random.Random(seed)
                made = MadeAnswer(rng)
                data = WRITERS[wire](rng, made).write().data
                told = [json.loads(text) for text in data if text != '[DONE]']
                for _ in range(rng.randint(1, 3)):
                    place = rng.choice(places_of(told))
                    told = replaced(told, place, rng.choice(ODD_VALUES))
                with self.subTest(seed=seed, wire=wire):
                    data, _ = sse_bytes(rng, map(json.dumps, told))
                    events = strict_events(translated_bytes(made.stream(wire), [data]))
                    self.check_grammar(events, f'{WHOLE}|{BROKEN}|{FAILED}')

    def test_nor_in_a_document(self):
        for seed in range(60):
            for wire in BOTH_WIRES:
                rng = random.Random(seed)
                made = MadeAnswer(rng)
                document = WRITERS[wire](rng, made).write_whole()
                document = replaced(document, rng.choice(places_of(document)),
                                    rng.choice(ODD_VALUES))
                with self.subTest(seed=seed, wire=wire):
                    try:
                        events = made.stream(wire).read_whole(json.dumps(document).encode())
                    except ValueError:
                        continue
                    self.check_grammar(events, f'{WHOLE}|{FAILED}')
                    json.dumps(folded(events))


def in_chunks(deltas, finish_reason):
    """Chunks of a Chat Completions stream."""
    told = [{'choices': [{'index': 0, 'delta': delta, 'finish_reason': None}]} for delta in deltas]
    return [*told, {'choices': [{'index': 0, 'delta': {}, 'finish_reason': finish_reason}]}]


def translate_answer(wire, told, **changes):
    """[event, ...] for an answer: a list of events, or one document."""
    body = {'model': OPUS, 'messages': [{'role': 'user', 'content': 'hi'}], 'thinking': IN_FULL,
            **changes}
    target = cf.Target(wire, 'https://example.com', 'gpt-5.4')
    stream = cf.answer_stream(cf.read_conversation(body), target, 'msg_01')
    if isinstance(told, dict):
        return stream.read_whole(json.dumps(told).encode())
    data = ''.join(f'data: {json.dumps(event)}\n\n' for event in told).encode()
    return strict_events(translated_bytes(stream, [data]))


# ==============================================================================
# Generated requests
# ==============================================================================

IMAGE = {'type': 'image',
         'source': {'type': 'base64', 'media_type': 'image/png', 'data': 'aW1hZ2U='}}
PDF_BLOCK = {'type': 'document',
             'source': {'type': 'base64', 'media_type': 'application/pdf', 'data': 'cGRm'}}
CALL_IDS = ('toolu_01', 'toolu_02', 'call:3.a', 'c' * 60 + '1', 'c' * 60 + '2', 'ü', '', 'c' * 200)
STRICT = {'type': 'object', 'properties': {'a': {'type': 'string'}}, 'required': ['a'],
          'additionalProperties': False}
BRANCHES = {'anyOf': [{'properties': {'a': {}}}, {'$ref': '#/$defs/b'}],
            '$defs': {'b': {'properties': {'c': {}}}}}
SCHEMAS = (None, {}, {'type': 'object'}, BRANCHES, STRICT,
           {'type': 'object', 'properties': {'format': {'type': 'array'}}, '$schema': 'x'})


class MadeRequest:
    """A random Messages request, and the texts that must be found in it when it is translated."""

    def __init__(self, rng):
        self.rng, self.texts, self.called, self.results = rng, [], [], 0
        roles = rng.choices(('user', 'assistant', 'system'), (5, 5, 1), k=rng.randint(1, 9))
        messages = [{'role': role, 'content': self.content(role)} for role in roles]
        self.body = {'model': OPUS, 'messages': messages, **self.options()}

    def text(self):
        """A text that is found again, or none."""
        if self.rng.random() < 0.15:
            return ''
        self.texts.append(f'<{len(self.texts)}> {random_text(self.rng)}')
        return self.texts[-1]

    def content(self, role):
        if self.rng.random() < 0.25:
            return self.text()
        return [self.block(role) for _ in range(self.rng.choice((0, 1, 1, 2, 3, 5)))]

    def block(self, role):
        makers = {'user': [self.text_block] * 2 + [self.result] * 3 + [self.other],
                  'assistant': [self.text_block] + [self.call] * 3
                  + [self.thinking, self.server_tool],
                  'system': [self.text_block]}
        return self.rng.choice(makers[role])()

    def text_block(self):
        cached = self.rng.choice(({}, {'cache_control': {'type': 'ephemeral'}}))
        return {'type': 'text', 'text': self.text(), **cached}

    def call(self):
        input = self.rng.choice((random_object(self.rng), {}, {}, None, 'text'))
        self.called.append(self.rng.choice(CALL_IDS))
        name = self.rng.choice(TOOL_NAMES)
        return {'type': 'tool_use', 'id': self.called[-1], 'name': name, 'input': input}

    def result(self):
        self.results += 1
        text = f'result {self.results}.'
        content = self.rng.choice(
            (text, [{'type': 'text', 'text': text}], [{'type': 'text', 'text': text}, IMAGE],
             {'a': text}, None, '', [], [{'type': 'text', 'text': ''}], [IMAGE, PDF_BLOCK],
             [{'type': 'tool_reference', 'tool_name': 'Read'}], [{'type': 'new'}], 7))
        failed = self.rng.choice(({}, {}, {'is_error': True}))
        id = self.rng.choice(self.called[-2:] * 4 + [*CALL_IDS])      # mostly of a late call
        return {'type': 'tool_result', 'tool_use_id': id, 'content': content, **failed}

    def thinking(self):
        seal = self.rng.choice(('RXJyb3I=', '', None, 'cfo0:', 'cfo1:gAAAA'))
        return self.rng.choice(({'type': 'thinking', 'thinking': 'hm', 'signature': seal},
                                {'type': 'redacted_thinking', 'data': seal}))

    def server_tool(self):
        found = [{'type': 'web_search_result', 'title': 'A page', 'url': 'https://example.com',
                  'encrypted_content': 'x'}]
        failed = {'type': 'web_search_tool_result_error', 'error_code': 'unavailable'}
        return self.rng.choice((
            {'type': 'server_tool_use', 'id': 'srvtoolu_1', 'name': 'web_search', 'input': {}},
            {'type': 'web_search_tool_result', 'tool_use_id': 'srvtoolu_1',
             'content': self.rng.choice((found, failed))},
            {'type': 'mcp_tool_use', 'id': 'mcptoolu_1', 'name': 'x', 'server_name': 'y',
             'input': {}},
            {'type': 'mcp_tool_result', 'tool_use_id': 'mcptoolu_1', 'content': 'ok'}))

    def other(self):
        sources = ({'type': 'url', 'url': 'https://example.com/a'},
                   {'type': 'file', 'file_id': 'file_1'},
                   None, {'type': 'text', 'media_type': 'text/plain', 'data': 'plain'},
                   {'type': 'content', 'content': [{'type': 'text', 'text': 'inner'}, IMAGE]})
        return self.rng.choice((
            IMAGE, PDF_BLOCK, {'type': 'image', 'source': self.rng.choice(sources[:3])},
            {'type': 'document', 'title': 'A title', 'source': self.rng.choice(sources)},
            {'type': 'document'},
            {'type': 'search_result', 'title': 't', 'source': 's',
             'content': [{'type': 'text', 'text': 'found'}]},
            {'type': 'container_upload', 'file_id': 'file_1'}, {'type': None}, {}, 'text', None))

    def options(self):
        rng = self.rng
        names = rng.sample(TOOL_NAMES, rng.randrange(6))
        tools = [{'name': name, 'input_schema': rng.choice(SCHEMAS),
                  'strict': rng.choice((True, False, None)),
                  'description': rng.choice(('', None, 'reads'))} for name in names]
        tools += rng.choice(([], [], [{'type': 'web_search_20250305', 'name': 'web_search',
                                       'max_uses': 5}]))
        chosen = rng.choice((None, {'type': 'auto', 'disable_parallel_tool_use': True},
                             {'type': 'any'}, {'type': 'none'},
                             {'type': 'tool', 'name': rng.choice(TOOL_NAMES)}))
        wanted = {
            'max_tokens': rng.choice((0, 1, 100, 128_000)), 'tools': tools, 'tool_choice': chosen,
            'stream': rng.choice((True, False)), 'temperature': rng.choice((0, 0.5, 1)),
            'top_p': 0.9, 'top_k': 5, 'stop_sequences': rng.choice(([], ['STOP'], list('abcdef'))),
            'thinking': rng.choice((IN_FULL, SEALED, {'type': 'disabled'},
                                    {'type': 'enabled', 'budget_tokens': 31_999})),
            'output_config': rng.choice(({'effort': 'low'}, {'effort': 'max'}, {'effort': None},
                                         {'format': {'type': 'json_schema', 'schema': STRICT}})),
            'metadata': {'user_id': rng.choice(('u' * 200, '{"session_id": "abc"}', '', None))},
            'service_tier': 'auto', 'container': 'x', 'mcp_servers': [{'name': 'x'}],
            'betas': ['y'], 'unheard_of': 1}
        options = {name: value for name, value in wanted.items() if rng.random() < 0.5}
        if rng.random() < 0.5:
            text = self.text()
            options['system'] = rng.choice((text, [{'type': 'text', 'text': text}]))
        return options


MODELS = ('gpt-5.4', 'gpt-5.5', 'gpt-5', 'o3', 'gpt-4.1', 'llama-4')


def targets(model):
    """Whereto a request may be translated, by name."""
    return {'chat': cf.Target(cf.CHAT_COMPLETIONS, 'https://api.openai.com', model,
                              is_openai=True),
            'responses': cf.Target(cf.RESPONSES, 'https://api.openai.com', model, is_openai=True),
            'codex': CODEX._replace(model=model)}


def translate(body, target):
    return cf.WIRES[target.wire].translate(cf.read_conversation(body), target)


def strings_of(value):
    """All texts within some JSON, in one."""
    if isinstance(value, dict):
        value = list(value.values())
    return '\0'.join(map(strings_of, value)) if isinstance(value, list) else str(value)


class RequestPropertiesTest(unittest.TestCase):
    """What must hold of every translated request."""

    def test_every_request_is_translated_whole_or_refused_and_stays_as_it_was(self):
        refused = 0
        for seed in range(150):
            made = MadeRequest(random.Random(seed))
            before = copy.deepcopy(made.body)
            for name, target in targets(MODELS[seed % len(MODELS)]).items():
                with self.subTest(seed=seed, target=name):
                    try:
                        out = translate(made.body, target)
                    except cf.Untranslatable:
                        refused += 1
                        continue
                    self.assertEqual(made.body, before)
                    self.check_texts(made, out)
                    self.check_names(out)
                    self.check_chat(out) if name == 'chat' else self.check_responses(out)
                    self.check_results(made.body, out)
        self.assertLess(refused, 100)

    def check_texts(self, made, out):
        told = strings_of([out.get('messages'), out.get('input'), out.get('instructions')])
        self.assertEqual([text for text in made.texts if text not in told], [])

    def check_results(self, body, out):
        """That each call has the result that the next turn of the user gave it first, whatever
        system messages part the turn."""
        wanted, calls, turns = [], [], []
        for role, group in itertools.groupby(body['messages'], lambda message: message['role']):
            blocks = [block for message in group for block in cf.as_blocks(message['content'])]
            if role == 'user' and turns and turns[-1][0] == 'user':
                turns[-1][1].extend(blocks)
            elif role != 'system':
                turns.append((role, blocks))
        for role, blocks in [*turns, ('', [])]:
            given = {}
            for block in blocks:
                if role == 'user' and block.get('type') == 'tool_result':
                    found = re.search(r'result \d+\.', strings_of(block['content']))
                    given.setdefault(block['tool_use_id'], found.group() if found else '')
            wanted += [given.get(call, cf.NO_RESULT) for call in calls]
            calls = [block['id'] for block in blocks
                     if role == 'assistant' and block.get('type') == 'tool_use']
        told = [message['content'] for message in out.get('messages', ())
                if message['role'] == 'tool']
        told += [item['output'] for item in out.get('input', ())
                 if item['type'] == 'function_call_output']
        self.assertEqual(len(told), len(wanted))
        for content, result in zip(told, wanted):
            self.assertIn(result, strings_of(content))

    def check_names(self, out):
        tools = [tool.get('function', tool) for tool in out.get('tools', ())
                 if tool['type'] == 'function']
        calls = [item for item in out.get('input', ()) if item['type'] == 'function_call']
        for message in out.get('messages', ()):
            calls += [call['function'] for call in message.get('tool_calls', ())]
        for function in tools + calls:
            self.assertRegex(function['name'], r'\A[A-Za-z0-9_-]{1,64}\Z')
        names = [tool['name'] for tool in tools]
        self.assertEqual(len(set(names)), len(names))
        choice = out.get('tool_choice')
        if isinstance(choice, dict) and choice['type'] == 'function':
            self.assertIn(choice.get('function', choice)['name'], names)
        for call in calls:
            self.assertIsInstance(json.loads(call['arguments']), dict)

    def check_chat(self, out):
        expected = []                   # ids of calls whose results must come next
        for message in out['messages']:
            if expected:
                self.assertEqual((message['role'], message.get('tool_call_id')),
                                 ('tool', expected.pop(0)))
            else:
                self.assertIn(message['role'], ('system', 'user', 'assistant'))
            expected += [call['id'] for call in message.get('tool_calls', ())]
            self.assertTrue(message['content'] or message.get('tool_calls'), message)
            for id in expected:
                self.assertRegex(id, r'\A[A-Za-z0-9_-]{1,40}\Z')
        self.assertEqual(expected, [])
        self.assertGreater(len(out['messages']), 0)

    def check_responses(self, out):
        expected = []                   # ids of calls that have no result yet
        for item in out['input']:
            if item['type'] == 'function_call':
                expected.append(item['call_id'])
                self.assertRegex(item['call_id'], r'\A[A-Za-z0-9_-]{1,64}\Z')
            elif item['type'] == 'function_call_output':
                expected.remove(item['call_id'])
                self.assertTrue(item['output'])
            elif item.get('role') in ('user', 'developer'):
                self.assertEqual(expected, [])
            self.assertTrue(item.get('content', True), item)
        self.assertEqual(expected, [])
        self.assertGreater(len(out['input']), 0)
        self.assertTrue(out['instructions'])

    def test_blocks_in_the_turn_of_another_are_translated_or_refused(self):
        call = {'type': 'tool_use', 'id': 'toolu_1', 'name': 'Read', 'input': {}}
        blocks = (IMAGE, PDF_BLOCK, call,
                  {'type': 'thinking', 'thinking': 'hm', 'signature': 'cfo1:gAAAA'},
                  *({'type': 'tool_result', 'tool_use_id': 'toolu_1', 'content': content}
                    for content in ('ok', [IMAGE], [call],
                                    [{'type': 'tool_result', 'content': 'ok'}])))
        broken = []
        roles = ('user', 'assistant', 'system')
        for role, block, name in itertools.product(roles, blocks, targets('gpt-5.4')):
            turns = [{'role': role, 'content': [block]}, {'role': 'user', 'content': 'a'}]
            for before in ([], [{'role': 'assistant', 'content': [call]}]):
                try:
                    out = translate({'messages': before + turns}, targets('gpt-5.4')[name])
                    self.check_chat(out) if name == 'chat' else self.check_responses(out)
                except cf.Untranslatable:
                    pass
                except Exception as error:          # an AssertionError too
                    broken.append((name, before + turns[:1], repr(error)))
        self.assertEqual(broken, [], f'{len(broken)} of them')

    def test_no_odd_value_anywhere_breaks_a_translation(self):
        body, broken = rich_request(), []
        for place, odd in itertools.product(places_of(body), (None, 7, '', [], [{}], {'a': {}})):
            for name in ('chat', 'codex'):
                try:
                    json.dumps(translate(replaced(body, place, odd), targets('gpt-5.4')[name]))
                except cf.Untranslatable:
                    pass
                except Exception as error:
                    broken.append((name, place, odd, repr(error)))
        self.assertEqual(broken, [], f'{len(broken)} of them')

    def test_a_conversation_of_which_nothing_would_be_left_is_refused(self):
        thinking = {'type': 'thinking', 'thinking': 'hm'}
        rows = (('user', ''), ('user', []), ('system', 'a'),
                ('assistant', [{'type': 'text', 'text': ''}]),
                ('assistant', [{**thinking, 'signature': 'RXJyb3I='}]),
                ('assistant', [{**thinking, 'signature': 'cfo1:gAAAA'}]))
        for role, content in rows:
            with self.subTest(role=role, content=content), self.assertRaises(cf.Untranslatable):
                translate({'messages': [{'role': role, 'content': content}]},
                          targets('gpt-5.4')['chat'])


def rich_request():
    """A request that has something of everything."""
    return {
        'model': OPUS, 'max_tokens': 100, 'system': [{'type': 'text', 'text': 'be brief'}],
        'stream': True, 'messages': [
            {'role': 'user', 'content': [{'type': 'text', 'text': 'look'}, IMAGE, PDF_BLOCK, {
                'type': 'document', 'title': 't',
                'source': {'type': 'content', 'content': [{'type': 'text', 'text': 'a'}]}}]},
            {'role': 'system', 'content': 'note'},
            {'role': 'assistant', 'content': [
                {'type': 'thinking', 'thinking': 'hm', 'signature': 'cfo1:gAAAA'},
                {'type': 'text', 'text': 'I read'},
                {'type': 'tool_use', 'id': 'toolu_1', 'name': 'Read', 'input': {'path': 'a'}}]},
            {'role': 'user', 'content': [
                {'type': 'tool_result', 'tool_use_id': 'toolu_1',
                 'content': [{'type': 'text', 'text': 'ok'}, IMAGE]},
                {'type': 'search_result', 'title': 't', 'source': 's',
                 'content': [{'type': 'text', 'text': 'found'}]}]},
            {'role': 'assistant',
             'content': [{'type': 'web_search_tool_result', 'tool_use_id': 'srvtoolu_1',
                          'content': [{'type': 'web_search_result', 'title': 'A page',
                                       'url': 'https://example.com'}]}]},
            {'role': 'user', 'content': 'go on'}],
        'tools': [{'name': 'Read', 'description': 'reads', 'strict': True, 'input_schema': STRICT},
                  {'name': 'Write',
                   'input_schema': {**BRANCHES, 'properties': {}, 'required': ['c']}},
                  {'type': 'web_search_20250305', 'name': 'web_search', 'allowed_domains': [
                      'example.com'], 'user_location': {'type': 'approximate', 'city': 'Oslo'}}],
        'tool_choice': {'type': 'tool', 'name': 'Read'},
        'thinking': {'type': 'enabled', 'budget_tokens': 4000}, 'output_config': {
            'effort': 'high', 'format': {'type': 'json_schema', 'name': 'a', 'schema': STRICT}},
        'metadata': {'user_id': '{"session_id": "abc"}'}, 'stop_sequences': ['STOP'],
        'temperature': 1}


# ==============================================================================
# The official SDKs as judges
# ==============================================================================

def run_worker(script, given):
    """What a script makes of some JSON, in the Python that has the SDKs; skips where they are
    not there."""
    if not os.path.exists(SDK_PYTHON):
        raise unittest.SkipTest(f'{SDK_PYTHON} is not installed')
    done = subprocess.run([SDK_PYTHON, '-c', script], input=json.dumps(given), capture_output=True,
                          text=True, env={'PATH': os.environ['PATH'], 'PYTHONIOENCODING': 'utf-8'},
                          timeout=120)
    if done.returncode == NOT_INSTALLED:
        raise unittest.SkipTest(f'{done.stderr.strip()} ({SDK_PYTHON})')
    if done.returncode:
        raise AssertionError(done.stderr)
    return json.loads(done.stdout)


NOT_INSTALLED = 3
ANTHROPIC_WORKER = '''
import json, sys
try:
    import anthropic
except ImportError as error:
    print(error, file=sys.stderr)
    sys.exit(3)
httpx = sys.modules[anthropic.DefaultHttpxClient.__mro__[1].__module__.partition('.')[0]]
answers = json.load(sys.stdin)

def answer(request):
    type, text = answers[int(request.headers['x-number'])]
    return httpx.Response(200, headers={'content-type': type}, content=text.encode())

client = anthropic.Anthropic(
    api_key='sk-ant-api03-mine', base_url='http://localhost', max_retries=0,
    _strict_response_validation=True,
    http_client=anthropic.DefaultHttpxClient(transport=httpx.MockTransport(answer)))

def ask(number, type):
    question = dict(model='any', max_tokens=9, messages=[{'role': 'user', 'content': 'hi'}],
                    extra_headers={'x-number': str(number)})
    if type == 'application/json':
        return client.messages.create(**question)
    with client.messages.stream(**question) as stream:
        return stream.get_final_message()

found = []
for number, (type, _) in enumerate(answers):
    try:
        found.append(ask(number, type).to_dict())
    except Exception as error:
        found.append({'error': f'{error.__class__.__name__}: {error}'})
print(json.dumps(found))
'''


class AnthropicSdkTest(unittest.TestCase):
    """The official Python SDK reads every translated answer, with its strict validation on."""

    @classmethod
    def setUpClass(cls):
        cls.cases = {}  # name -> (a stream or a document, fields of the message that it tells)
        for seed in range(60):
            for wire in BOTH_WIRES:
                cls.add_made(f'{wire} {seed}', random.Random(seed), wire)
        for name, (events, content, stop_reason) in corner_cases().items():
            cls.add(name, events, {'content': content, 'stop_reason': stop_reason})
        unsigned = [{'type': 'content_block_start', 'index': 0, 'content_block': {
            'type': 'thinking', 'thinking': '', 'signature': None}}]
        opening = translate_answer(cf.CHAT_COMPLETIONS, in_chunks([], 'stop'))
        cls.cases['a flaw'] = (sse_text([opening[0], *unsigned, *opening[1:]]), {})
        told = [*in_chunks([{'content': 'hi'}], None), *UPSTREAM_ERRORS[cf.CHAT_COMPLETIONS][:1]]
        cls.cases['an error'] = (sse_text(translate_answer(cf.CHAT_COMPLETIONS, told)), {})
        given = [('text/event-stream', answer) if isinstance(answer, str)
                 else ('application/json', cf.dump_body(answer).decode())
                 for answer, _ in cls.cases.values()]
        cls.read = dict(zip(cls.cases, run_worker(ANTHROPIC_WORKER, given)))

    @classmethod
    def add_made(cls, name, rng, wire):
        made = MadeAnswer(rng)
        written, data, _ = written_stream(rng, made, wire)
        events = strict_events(translated_bytes(made.stream(wire), [data]))
        wanted = {'stop_reason': made.stop_reason, 'usage': made.usage, 'model': OPUS,
                  'stop_sequence': None}
        if written.is_exact and not made.is_cut:    # of a call that was cut it reads what there is
            wanted['content'] = made.blocks(wire)
        cls.add(name, events, wanted)

    @classmethod
    def add(cls, name, events, wanted):
        cls.cases[name] = (sse_text(events), wanted)
        cls.cases[f'{name}, whole'] = (cf.message_from_events(events), wanted)

    def test_it_reads_what_was_made(self):
        for name, (_, wanted) in self.cases.items():
            message = self.read[name]
            if wanted:
                with self.subTest(name):
                    self.assertNotIn('error', message)
                    self.assertEqual({field: message[field] for field in wanted}, wanted)

    def test_it_tells_an_error_in_the_stream(self):
        self.assertRegex(self.read['an error']['error'], 'Overloaded')

    def test_it_would_refuse_what_is_not_of_its_types(self):
        self.assertRegex(self.read['a flaw']['error'], 'APIResponseValidationError')


def sse_text(events):
    return b''.join(map(cf.event_bytes, events)).decode()


def corner_cases():
    """name -> (events, content, stop_reason)"""
    def chat(deltas, finish_reason='stop', **changes):
        return translate_answer(cf.CHAT_COMPLETIONS, in_chunks(deltas, finish_reason), **changes)

    def responses(*items, **fields):
        return translate_answer(cf.RESPONSES,
                                {'status': 'completed', 'output': list(items), **fields})

    def call(number, arguments):
        return {'index': number, 'id': f'call_{number}',
                'function': {'name': 'Read', 'arguments': arguments}}
    used = {'type': 'tool_use', 'name': 'Read', 'input': {}}
    refused = {'type': 'message', 'content': [{'type': 'refusal', 'refusal': 'no'}]}
    sealed = {'type': 'reasoning', 'summary': [], 'encrypted_content': 'gAAAA'}
    text = [{'type': 'text', 'text': 'no'}]
    return {
        'nothing at all': (chat([]), [], 'end_turn'),
        'nothing in a document': (responses(), [], 'end_turn'),
        'a refusal': (chat([{'refusal': 'n'}, {'refusal': 'o'}]), text, 'refusal'),
        'a refusal of Responses': (responses(refused), text, 'refusal'),
        'a filter': (responses(status='incomplete',
                               incomplete_details={'reason': 'content_filter'}), [], 'refusal'),
        'a stop sequence': (chat([{'content': 'no STOP'}], stop_sequences=[' STOP']), text,
                            'stop_sequence'),
        'calls without arguments': (
            chat([{'tool_calls': [call(0, ''), call(1, '{}')]}], 'tool_calls'),
            [{**used, 'id': 'call_0'}, {**used, 'id': 'call_1'}], 'tool_use'),
        'a call without a name': (
            chat([{'tool_calls': [{'index': 0, 'id': 'a', 'function': {'arguments': '{}'}}]}]), [],
            'end_turn'),
        'sealed thinking': (responses(sealed), [{'type': 'thinking', 'thinking': '',
                                                 'signature': 'cfo1:gAAAA'}], 'end_turn'),
        'a call cut short': (chat([{'tool_calls': [call(0, '')]}], 'length'),
                             [{**used, 'id': 'call_0'}], 'max_tokens'),
    }


def claude_code_request(*turns, **changes):
    """A request as Claude Code makes it."""
    cached = {'cache_control': {'type': 'ephemeral'}}
    schema = {'$schema': 'https://json-schema.org/draft/2020-12/schema', 'type': 'object',
              'required': ['file_path'],
              'properties': {'file_path': {'type': 'string'},
                             'limit': {'type': 'integer', 'exclusiveMinimum': 0},
                             'edits': {'type': 'array'},
                             'to': {'type': 'object', 'propertyNames': {'type': 'string'}},
                             'url': {'type': 'string', 'format': 'uri'}},
              'additionalProperties': False}
    tools = [{'name': 'Read', 'description': 'Reads a file.', 'input_schema': schema},
             {'name': 'CronList', 'input_schema': {'type': 'object', 'properties': {}},
              'defer_loading': True},
             {'name': 'DeferredToolPlaceholder', 'description': 'never call this',
              'input_schema': {'type': 'object'}},
             {'name': 'mcp__a_server.with.dots__' + 'and_a_long_name_' * 4,
              'description': 'of an MCP server', 'input_schema': {'anyOf': [
                  {'type': 'object', 'properties': {'a': {'type': 'string'}}}, {'type': 'null'}]}},
             {'name': 'Strict', 'strict': True, 'input_schema': STRICT, **cached}]
    return {
        'model': OPUS, 'max_tokens': 128_000, 'stream': True,
        'system': [{'type': 'text', 'text': 'x-anthropic-billing-header: cc_version=2.1.330.000;'},
                   {'type': 'text', 'text': 'You are Claude Code.', **cached}],
        'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': 'a reminder'},
                                                  {'type': 'text', 'text': 'do it', **cached}]},
                     {'role': 'system', 'content': 'a note',
                      'output_config': {'effort': 'medium'}}, *turns], 'tools': tools,
        'metadata': {'user_id': json.dumps({'device_id': '0' * 64, 'session_id': '0000-4000'})},
        'thinking': {'type': 'adaptive', 'display': 'omitted'},
        'output_config': {'effort': 'medium'},
        'context_management': {'edits': [{'type': 'clear_thinking_20251015', 'keep': 'all'}]},
        **changes}


def tool_turns(*contents, **fields):
    """Thinking, a text, parallel calls, and their results."""
    calls = [{'type': 'tool_use', 'id': f'toolu_{place}', 'name': 'Read',
              'input': {'file_path': 'ä "b"'}} for place in range(len(contents))]
    thinking = [{'type': 'thinking', 'thinking': 'hm', 'signature': seal}
                for seal in ('cfo1:gAAAA', 'RXJyb3I=')]
    results = [{'type': 'tool_result', 'tool_use_id': f'toolu_{place}', 'content': content,
                **fields} for place, content in enumerate(contents)]
    return [{'role': 'assistant', 'content': [*thinking, {'type': 'text', 'text': 'I read.'},
                                              *calls]}, {'role': 'user', 'content': results}]


def client_requests():
    """name -> a request in the manner of a real client."""
    image_url = {'type': 'image', 'source': {'type': 'url', 'url': 'https://example.com/a.png'}}
    pdf_url = {'type': 'document', 'source': {'type': 'url', 'url': 'https://example.com/a.pdf'},
               'title': 'a.pdf'}
    cited = {'type': 'document', 'title': 't', 'citations': {'enabled': True}, 'context': 'c',
             'source': {'type': 'text', 'media_type': 'text/plain', 'data': 'plain'}}
    loaded = [{'type': 'tool_reference', 'tool_name': 'CronList'},
              {'type': 'tool_reference', 'tool_name': 'Read'}]
    search = {'type': 'web_search_20250305', 'name': 'web_search', 'max_uses': 8}
    near = {'allowed_domains': ['example.com'],
            'user_location': {'type': 'approximate', 'city': 'Oslo', 'region': 'Oslo',
                              'country': 'NO', 'timezone': 'Europe/Oslo'}}
    searched = [{'type': 'server_tool_use', 'id': 'srvtoolu_1', 'name': 'web_search',
                 'input': {'query': 'a'}},
                {'type': 'web_search_tool_result', 'tool_use_id': 'srvtoolu_1', 'content': [{
                    'type': 'web_search_result', 'title': 'A', 'url': 'https://example.com',
                    'encrypted_content': 'x'}]}]
    title = {'format': {'type': 'json_schema', 'schema': {
        **STRICT, 'properties': {'title': {'type': 'string'}}, 'required': ['title']}}}
    loose = {'format': {'type': 'json_schema', 'name': 'a name that OpenAI refuses!',
                        'schema': {'type': 'object'}}}
    plain = {'model': OPUS, 'max_tokens': 256, 'messages': [{'role': 'user', 'content': 'hi'}]}
    found = {
        'a first turn': claude_code_request(),
        'results': claude_code_request(*tool_turns('ok', [{'type': 'text', 'text': 'a'}], None)),
        'results with media': claude_code_request(
            *tool_turns([IMAGE], [{'type': 'text', 'text': 'a'}, PDF_BLOCK])),
        'errors': claude_code_request(*tool_turns('bad', '', is_error=True)),
        'a reference to tools': claude_code_request(*tool_turns(loaded)),
        'an answer that was cut': claude_code_request(*tool_turns('ok', 'ok')[:1]),
        'media': claude_code_request({'role': 'user',
                                      'content': [IMAGE, image_url, PDF_BLOCK, pdf_url, cited]}),
        'an empty system message': claude_code_request({'role': 'system', 'content': []}),
        'a system message between a call and its result': claude_code_request(
            tool_turns('ok')[0], {'role': 'system', 'content': [{'type': 'text', 'text': 'late'}]},
            tool_turns('ok')[1]),
        'a search before': claude_code_request({'role': 'assistant', 'content': searched},
                                               {'role': 'user', 'content': 'a'}),
        'a search': claude_code_request(tools=[search], thinking=None,
                                        tool_choice={'type': 'auto'}),
        'a search somewhere': claude_code_request(
            tools=[{**search, **near, 'blocked_domains': None}]),
        'client tools': claude_code_request(tools=[{'type': 'bash_20250124', 'name': 'bash'}, {
            'type': 'text_editor_20250728', 'name': 'str_replace_based_edit_tool'}]),
        'a structured answer': claude_code_request(tools=[], output_config=title, thinking=None),
        'a structured answer of an older client': {**plain, 'output_format': loose['format']},
        'a structured answer beside tools': claude_code_request(
            output_config={**loose, 'effort': 'high'}),
        'safeguards': claude_code_request(safeguards=[{'type': 'dangerous_tool_use'}]),
        'a text alone': {**plain, 'system': 'be brief', 'temperature': 0, 'top_p': 0.5,
                         'top_k': 3},
        'a user': {**plain, 'metadata': {'user_id': 'u' * 300}},
        'one word': {**plain, 'max_tokens': 1, 'temperature': 1},
        'the beginning of an answer': {
            **plain, 'messages': [*plain['messages'], {'role': 'assistant', 'content': '{'}]},
        'many tools': claude_code_request(
            tools=[{'name': f'tool_{number}', 'input_schema': {}} for number in range(200)]),
        'something of everything': rich_request()}
    for count in (1, 4, 5):
        found[f'{count} stop sequences'] = {**plain,
                                            'stop_sequences': ['a', 'b', 'c', 'd', 'e'][:count]}
    for type in ('auto', 'any', 'none'):
        choice = {'type': type, 'disable_parallel_tool_use': True}
        found[f'tool_choice {type}'] = claude_code_request(tool_choice=choice)
    for name in ('Read', claude_code_request()['tools'][3]['name']):
        found[f'tool_choice {name}'] = claude_code_request(
            tool_choice={'type': 'tool', 'name': name})
    for effort in ('low', 'medium', 'high', 'xhigh', 'max'):
        for thinking in (IN_FULL, None):
            found[f'effort {effort} with {thinking}'] = {**plain, 'thinking': thinking,
                                                         'output_config': {'effort': effort}}
    for thinking in (SEALED, {'type': 'disabled'}, {'type': 'between_tools'},
                     {'type': 'enabled', 'budget_tokens': 31_999}):
        found[f'thinking {thinking}'] = claude_code_request(thinking=thinking, output_config=None)
    return found


OPENAI_WORKER = '''
import json, sys, typing
try:
    import pydantic, typing_extensions
    typing.Iterable = typing.List       # pydantic does not look into an Iterable
    from openai.types.chat.completion_create_params import CompletionCreateParams
    from openai.types.responses.response_create_params import ResponseCreateParams
except ImportError as error:
    print(error, file=sys.stderr)
    sys.exit(3)
for name, module in list(sys.modules.items()):
    for value in list(vars(module).values()) if name.startswith('openai.types') else ():
        if typing_extensions.is_typeddict(value):
            value.__pydantic_config__ = pydantic.ConfigDict(extra='forbid', strict=True)
adapters = {'chat_completions': pydantic.TypeAdapter(CompletionCreateParams),
            'responses': pydantic.TypeAdapter(ResponseCreateParams)}

def complaints(wire, body):
    """The deepest ones: they are of the type that was meant."""
    try:
        adapters[wire].validate_json(json.dumps(body))
    except pydantic.ValidationError as error:
        found = [['.'.join(map(str, row['loc'])), row['msg']]
                 for row in error.errors(include_url=False)]
        return sorted(found, key=lambda row: -row[0].count('.'))[:3]
    return []

print(json.dumps([complaints(wire, body) for wire, body in json.load(sys.stdin)]))
'''


class OpenAiSdkTest(unittest.TestCase):
    """Every translated request is of the official SDK's types, which know no other field at any
    level."""

    @classmethod
    def setUpClass(cls):
        cls.bodies = {}
        for name, body in client_requests().items():
            for model, place in itertools.product(MODELS, targets('any')):
                target = targets(model)[place]
                cls.bodies[name, model, place] = target.wire, translate(body, target)
        for seed in range(100):
            body, model = MadeRequest(random.Random(seed)).body, MODELS[seed % len(MODELS)]
            for place, target in targets(model).items():
                with contextlib.suppress(cf.Untranslatable):
                    cls.bodies[f'made {seed}', model, place] = target.wire, translate(body, target)
        search = claude_code_request(tools=[{'type': 'web_search_20250305', 'name': 'web_search'}],
                                     tool_choice={'type': 'tool', 'name': 'web_search'})
        cls.bodies['a search that must be'] = cf.RESPONSES, translate(search, CODEX)
        cls.bodies['a flaw'] = cf.RESPONSES, {'model': 'gpt-5.4', 'input': [
            {'role': 'user',
             'content': [{'type': 'input_text', 'text': 'a', 'cache_control': {}}]}]}
        given = [(wire, as_it_was_returned(body)) for wire, body in cls.bodies.values()]
        cls.complaints = dict(zip(cls.bodies, run_worker(OPENAI_WORKER, given)))

    def test_every_translated_request_is_of_its_types(self):
        for name, complaints in self.complaints.items():
            if isinstance(name, tuple):
                with self.subTest(name):
                    self.assertEqual(complaints, [])

    def test_a_search_that_must_be_made_is_of_its_types(self):
        self.assertEqual(self.complaints['a search that must be'], [])

    def test_it_would_refuse_a_field_of_another_api(self):
        self.assertIn('cache_control', str(self.complaints['a flaw']))

    def test_codex_gets_no_field_that_it_refuses(self):
        known = {'model', 'instructions', 'input', 'tools', 'tool_choice', 'parallel_tool_calls',
                 'reasoning', 'store', 'stream', 'include', 'prompt_cache_key', 'text'}
        for name, (_, body) in self.bodies.items():
            if name[-1] == 'codex':
                with self.subTest(name):
                    self.assertEqual(set(body) - known, set())
                    self.assertLessEqual({item.get('role') for item in body['input']},
                                         {None, 'user', 'assistant'})


def as_it_was_returned(body):
    """A body with the fields that the types want of the model's earlier output, as the API once
    returned it; OpenAI's own Codex leaves them out, as we do: what is not stored has no id."""
    def filled(item):
        if item['type'] == 'reasoning':
            return {'id': 'rs_1', **item}
        if item.get('role') != 'assistant' or isinstance(item['content'], str):
            return item
        content = [{'annotations': [], **part} for part in item['content']]
        return {'id': 'msg_1', 'status': 'completed', **item, 'content': content}
    is_whole = all('type' in item for item in body.get('input', ()))
    return ({**body, 'input': list(map(filled, body['input']))} if 'input' in body and is_whole
            else body)


# ==============================================================================
# Cooldowns
# ==============================================================================

def rule(name):
    return next(rule for rule in (*cf.RULES, cf.UNREACHABLE, cf.RESET) if rule.name == name)


class CooldownsTest(unittest.TestCase):
    def setUp(self):
        self.clock = FakeClock()
        self.cooldowns = cf.Cooldowns(self.clock, self.clock.unix_s)
        self.a, self.b = make_config('a', 'b').keys.values()

    def slot(self, key=None, model=OPUS, feature=None):
        return cf.Slot((key or self.a).ref, model, feature, 'https://a.example')

    def cool(self, name, hint_s=None, key=None, model=OPUS, limit_s=3600, **slot):
        outcome = cf.Outcome(rule(name), 429, 'why', hint_s)
        return self.cooldowns.cool(key or self.a, self.slot(key, model, **slot), outcome, limit_s)

    def succeed(self, key=None, model=OPUS, sent_at=None):
        sent_at = self.clock.now if sent_at is None else sent_at
        self.cooldowns.succeeded(self.slot(key, model), sent_at)

    def wait_for(self, *slots):
        ticket = self.cooldowns.join_queue(threading.Event())
        self.cooldowns.await_slots(ticket, slots or [self.slot()])
        return ticket

    def left(self, key=None, model=OPUS, ticket=None, **slot):
        cooling = self.cooldowns.blocking(self.slot(key, model, **slot), ticket)
        return cooling and self.cooldowns.remaining_s(cooling)[0]

    def test_a_pair_cools_alone_and_a_key_for_every_model(self):
        self.cool('rate_limited', 20)
        self.assertEqual((self.left(), self.left(model=SONNET), self.left(self.b)),
                         (20, None, None))
        self.cool('auth_failed')
        self.assertEqual((self.left(), self.left(model=SONNET), self.left(model=None)),
                         (300, 300, 300))

    def test_a_hint_is_capped_and_an_end_is_an_end(self):
        self.cool('rate_limited', 7200)
        self.clock.now += 3599
        self.assertEqual(self.left(), 1)
        self.clock.now += 1
        self.assertIsNone(self.left())

    def test_a_cooldown_never_shortens_a_longer_one(self):
        self.cool('rate_limited', 100)
        self.cool('rate_limited', 5)
        self.assertEqual(self.left(), 100)

    def test_repeats_double_up_to_their_limit_and_a_success_starts_over(self):
        lengths = []
        for _ in range(6):
            lengths.append(self.cool('throttled'))
            self.clock.now += lengths[-1]
        self.assertEqual(lengths, [30, 60, 120, 240, 300, 300])
        self.succeed()
        self.assertEqual(self.cool('throttled'), 30)

    def test_requests_that_meet_one_limit_together_count_as_one_repeat(self):
        self.assertEqual([self.cool('throttled') for _ in range(3)], [30, 30, 30])
        self.clock.now += 30
        self.assertEqual(self.cool('throttled'), 60)

    def test_the_third_server_error_in_a_row_cools(self):
        self.assertEqual([self.cool('server_error') for _ in range(3)], [0, 0, 15])
        self.succeed()
        self.assertEqual(self.cool('server_error'), 0)
        self.succeed()
        self.assertEqual([self.cool('unreachable') for _ in range(3)], [0, 0, 1])
        self.assertEqual((self.left(model=SONNET), self.left(self.b)), (1, 1))     # its server's

    def test_a_success_ends_what_was_a_guess_or_is_older_than_its_request(self):
        """(rule, hint, when the request was sent that is answered now, what is left then)"""
        for name, hint_s, sent_at, left in (
                ('throttled', None, 999, None), ('throttled', None, 1001, None),
                ('rate_limited', 100, 999, 98), ('rate_limited', 100, 1001, None),
                ('window_spent', 200, 999, 198), ('window_spent', 200, 1001, None),
                ('auth_failed', None, 1001, None)):
            with self.subTest(rule=name, sent_at=sent_at):
                self.setUp()
                self.cool(name, hint_s)
                self.clock.now += 2
                self.succeed(sent_at=sent_at)
                self.assertEqual(self.left(), left)

    def test_an_answer_on_another_path_proves_nothing(self):
        self.cool('window_spent', 200)
        self.succeed(model=None)
        self.assertEqual(self.left(), 200)

    def test_clearing_ends_all_or_some(self):
        for key in (self.a, self.b):
            self.cool('rate_limited', 100, key)
            self.cool('rate_limited', 100, key, SONNET)
        self.assertEqual(self.cooldowns.clear(self.a.ref, OPUS), 1)
        self.assertEqual((self.left(), self.left(model=SONNET)), (None, 100))
        self.assertEqual(self.cooldowns.clear(self.a.ref), 1)
        self.assertEqual(self.cooldowns.clear(), 2)
        self.assertEqual(self.cooldowns.snapshot(), [])

    def test_the_snapshot_lists_the_earliest_return_first(self):
        self.cool('rate_limited', 100)
        self.cool('rate_limited', 50, self.b)
        self.assertEqual([(c.key.id, left) for c, left in self.cooldowns.snapshot()],
                         [('b', 50), ('a', 100)])

    def prospect(self, cooling, model=OPUS, order=('anthropic:a', 'anthropic:b', 'openai:o'),
                 unusable=(), was_seen=False, **changes):
        """(state, key, model, seconds, the keys passed over, the next key) of who serves."""
        document = make_document('a', 'b', **with_openai('o', **changes))
        document['profiles']['default'] = {'port': 0, 'priorityOrder': list(order)}
        config = cf.parse_config(document)
        known = {**config.keys, 'client': cf.Key('client:1', 'client', cf.ANTHROPIC, '', 'client')}
        snapshot = []
        for ref, cooled, name, left in cooling:
            place = cf.Slot(known[ref].ref, cooled)
            outcome = cf.Outcome(rule(name), 429, '')
            snapshot.append((cf.Cooling(known[ref], place, outcome, 0, 0, 0, 0, 0, None), left))
        told = cf.who_serves(config, config.profiles['default'], model, snapshot,
                             unusable, was_seen)
        key_of = lambda attempt: attempt and attempt.key.id
        return (told.state, key_of(told.attempt), told.attempt and told.attempt.model, told.back_s,
                ''.join(map(key_of, told.passed)), key_of(told.next))

    def test_who_serves_is_told_from_the_plan_and_what_cools(self):
        def cool(ref, left, model=None, name='rate_limited'):
            return ref, model, name, left
        a, b, o = (cool(ref, left)
                   for ref, left in (('anthropic:a', 30), ('anthropic:b', 20), ('openai:o', 40)))
        a_opus, b_opus = cool('anthropic:a', 30, OPUS), cool('anthropic:b', 20, OPUS)
        gone = cool('anthropic:b', 5, None, 'auth_failed')
        no_fallback = {'modelFallback': {}}
        for cooling, changes, expected in (
                ([], {}, ('ready', 'a', OPUS, None, '', 'b')),
                ([a], {}, ('ready', 'b', OPUS, None, 'a', 'b')),
                ([a_opus], {}, ('ready', 'b', OPUS, None, 'a', 'a')),
                ([a_opus], {'model': SONNET}, ('ready', 'a', SONNET, None, '', 'b')),
                ([a_opus, b_opus], {}, ('ready', 'a', SONNET, None, 'ab', 'b')),
                ([a_opus, b_opus], no_fallback, ('ready', 'o', 'gpt-5.4', None, 'ab', None)),
                ([a, b], {}, ('ready', 'o', 'gpt-5.4', None, 'abab', None)),
                ([a, b], {'openaiModelFallback': False}, ('cooling', 'b', OPUS, 20, '', None)),
                ([a, b], {'unusable': ['openai:o']}, ('cooling', 'b', OPUS, 20, '', None)),
                ([a, b, o], {}, ('cooling', 'b', OPUS, 20, '', None)),
                ([a, b, cool('openai:o', 9, 'gpt-5.4')], {},
                 ('cooling', 'o', 'gpt-5.4', 9, '', None)),
                ([a, b, cool('openai:o', 9, 'gpt-5.4-mini')], {},
                 ('ready', 'o', 'gpt-5.4', None, 'abab', None)),
                ([a, a_opus, cool('anthropic:b', 35), o], no_fallback,
                 ('cooling', 'a', OPUS, 30, '', None)),
                ([a, gone, o], {}, ('cooling', 'a', OPUS, 30, '', None)),  # a person must see to b
                ([gone], {'unusable': ['anthropic:a', 'openai:o']},
                 ('cooling', 'b', OPUS, 5, '', None)),
                ([], {'unusable': ['anthropic:a']}, ('ready', 'b', OPUS, None, 'a', 'b')),
                ([], {'unusable': ['anthropic:a', 'anthropic:b', 'openai:o']},
                 ('unusable', None, None, None, '', None)),
                ([], {'order': ['openai:o', 'anthropic:a']},
                 ('ready', 'o', 'gpt-5.4', None, '', 'a')),
                ([], {'model': None}, ('ready', 'a', None, None, '', 'b')),
                ([a, b, o], {'model': None}, ('cooling', 'b', None, 20, '', None)),
                ([], {'order': ['client', 'anthropic:a']}, ('ready', 'a', OPUS, None, '', 'b')),
                ([], {'order': ['client', 'anthropic:a'], 'was_seen': True},
                 ('ready', 'client', OPUS, None, '', 'a')),
                ([cool('client', 9, OPUS)], {'order': ['client', 'anthropic:a'], 'was_seen': True},
                 ('ready', 'a', OPUS, None, 'client', 'b'))):
            with self.subTest(cooling=cooling, **changes):
                self.assertEqual(self.prospect(cooling, **changes), expected)

    def test_where_no_key_is_served_the_clients_own_login_is(self):
        for config in (make_config(), make_config(**with_openai('o', openaiModelFallback=False))):
            self.assertEqual(cf.who_serves(config, config.profiles['default'], OPUS,
                                           []).attempt.key.id, 'client')

    def test_only_the_first_in_the_queue_tries_a_key_that_comes_back(self):
        self.cool('rate_limited', 20)
        first, second = self.wait_for(), self.wait_for()
        self.assertEqual(self.cooldowns.seconds_to_turn(first), (20, False))
        self.clock.now += 20
        self.assertEqual(self.cooldowns.seconds_to_turn(first), (0, False))
        self.assertEqual(self.cooldowns.seconds_to_turn(second), (float('inf'), True))
        self.assertEqual((self.left(ticket=first), self.left(ticket=second), self.left()),
                         (None, 0, 0))
        self.assertIsNone(self.cooldowns.admit(self.slot(), 'first', first))
        self.assertEqual(self.cooldowns.seconds_to_turn(second), (cf.PROBE_S, True))
        self.succeed()
        self.assertTrue(second.wake.is_set())
        self.assertEqual(self.cooldowns.seconds_to_turn(second), (0, False))

    def test_the_next_in_the_queue_follows_when_the_first_leaves_or_fails(self):
        self.cool('rate_limited', 20)
        first, second = self.wait_for(), self.wait_for()
        self.clock.now += 20
        self.assertEqual(self.cooldowns.seconds_to_turn(first), (0, False))
        self.cool('rate_limited', 30)
        self.assertEqual(self.cooldowns.seconds_to_turn(second), (30, False))
        self.clock.now += 30
        self.cooldowns.leave_queue(first)
        self.assertTrue(second.wake.is_set())
        self.assertEqual(self.cooldowns.seconds_to_turn(second), (0, False))

    def test_nobody_waits_for_money_or_a_login(self):
        self.cool('auth_failed')
        ticket = self.wait_for()
        self.assertEqual(self.cooldowns.seconds_to_turn(ticket), (float('inf'), False))

    def test_one_behind_another_waits_for_it_however_far_its_other_slots_are(self):
        self.cool('rate_limited', 20)
        self.cool('rate_limited', 3000, self.b)
        both = [self.slot(self.a), self.slot(self.b)]
        _, second = self.wait_for(*both), self.wait_for(*both)
        self.clock.now += 20
        self.assertEqual(self.cooldowns.seconds_to_turn(second), (2980, True))

    def test_a_request_that_tries_one_key_bars_no_other(self):
        both = [self.slot(self.a), self.slot(self.b)]
        for key in (self.a, self.b):
            self.cool('rate_limited', 20, key)
        first, second = self.wait_for(*both), self.wait_for(*both)
        self.clock.now += 20
        self.assertEqual(self.cooldowns.seconds_to_turn(second), (float('inf'), True))
        self.cooldowns.admit(self.slot(self.b), 'first', first)
        self.assertTrue(second.wake.is_set())
        self.assertEqual(self.cooldowns.seconds_to_turn(second), (0, False))
        self.assertEqual(self.left(self.b, ticket=second), 0)

    def test_a_prober_has_three_seconds_to_be_refused(self):
        self.cool('rate_limited', 20)
        tickets = [self.wait_for() for _ in range(8)]
        self.clock.now += 20
        went = []
        for _ in range(4):
            for number, ticket in enumerate(tickets):
                if number not in went and self.cooldowns.seconds_to_turn(ticket)[0] == 0:
                    self.assertIsNone(self.cooldowns.admit(self.slot(), number, ticket))
                    went.append(number)
            went.append('|')
            self.clock.now += cf.PROBE_S
        self.assertEqual(went, [0, '|', 1, 2, '|', 3, 4, 5, 6, 7, '|', '|'])

    def test_answers_let_twice_as_many_follow_and_a_refusal_begins_anew(self):
        self.cool('rate_limited', 20)
        tickets = [self.wait_for() for _ in range(7)]
        self.clock.now += 20

        def go():
            gone = [n for n, ticket in enumerate(tickets) if ticket.slots
                    and self.cooldowns.seconds_to_turn(ticket)[0] == 0]
            for number in gone:
                self.cooldowns.admit(self.slot(), number, tickets[number])
            return gone

        def answer(number):
            self.succeed()
            self.cooldowns.leave(number)
            self.cooldowns.leave_queue(tickets[number])
        self.assertEqual(go(), [0])
        answer(0)
        self.assertEqual(go(), [1, 2])
        answer(1)
        self.assertEqual(go(), [3, 4, 5])         # four at a time, and one is under way
        self.cool('rate_limited', 5)
        self.clock.now += 5
        self.assertEqual(go(), [6])
        self.assertIsNotNone(self.left())         # a fresh arrival stands behind it

    def test_fresh_arrivals_are_not_ten_probes(self):
        self.cool('rate_limited', 20)
        self.clock.now += 20
        admitted = [self.cooldowns.admit(self.slot(), number) is None for number in range(10)]
        self.assertEqual(admitted, [True] + [False] * 9)
        self.cooldowns.leave(0)                   # it was given up: the next may try
        self.assertIsNone(self.cooldowns.admit(self.slot(), 1))

    def test_a_feature_with_limits_of_its_own_cools_alone(self):
        self.cool('rate_limited', 20, feature='fast')
        self.assertEqual((self.left(feature='fast'), self.left(), self.left(feature='1m')),
                         (20, None, None))
        self.cool('rate_limited', 50)
        self.assertEqual((self.left(feature='fast'), self.left(), self.left(feature='1m')),
                         (50, 50, 50))

    def test_the_clock_that_went_further_ends_a_cooldown(self):
        """Eight hours of sleep stop the monotonic clock; a wall clock may be set back."""
        wall = [START]
        self.cooldowns = cf.Cooldowns(self.clock, lambda: wall[0])
        self.cool('rate_limited', 1800)
        wall[0] += 8 * 3600
        self.assertIsNone(self.left())
        self.cool('rate_limited', 1800)
        wall[0] -= 5 * 3600
        self.clock.now += 1000
        self.assertEqual(self.left(), 800)
        self.clock.now += 800
        self.assertIsNone(self.left())

    def test_what_a_person_may_have_mended_is_asked_again(self):
        """(rule, hint, at which of the seconds 0, 1, 2 ... a request with nothing else asks)"""
        for name, hint_s, asked in (
                ('auth_failed', None, [0, 5, 10]), ('billing', None, [0, 5, 10]),
                ('forbidden', None, [0, 5, 10]), ('unknown_model', None, [0, 5, 10]),
                ('rate_limited', 100, []), ('throttled', None, []), ('overloaded', None, []),
                ('window_spent', 14_000, [300, 900, 1800])):
            with self.subTest(rule=name):
                self.setUp()
                self.cool(name, hint_s, limit_s=14_000)
                seconds = range(2000) if asked[-1:] == [1800] else range(12)
                found = []
                for second in seconds:
                    if self.cooldowns.last_hope([self.slot()]):
                        found.append(second)
                    self.clock.now += 1
                self.assertEqual(found, asked)

    def test_of_several_hopes_the_one_that_was_asked_longest_ago_is_next(self):
        self.cool('billing')
        self.clock.now += 1
        self.cool('auth_failed', key=self.b)
        slots, asked = [self.slot(self.b), self.slot(self.a)], []
        for _ in range(2):
            asked += [hope and hope.ref
                      for hope in (self.cooldowns.last_hope(slots) for _ in '123')]
            self.clock.now += cf.HOPE_S
        self.assertEqual(asked,
                         ['anthropic:a', 'anthropic:b', None, 'anthropic:b', 'anthropic:a', None])

    def test_one_who_cannot_go_yet_holds_up_nobody(self):
        self.cool('window_spent', 5)
        self.cool('rate_limited', 60)
        opus, sonnet = self.wait_for(), self.wait_for(self.slot(model=SONNET))
        self.clock.now += 6
        self.assertEqual(self.cooldowns.seconds_to_turn(opus), (54, False))
        self.assertEqual(self.cooldowns.seconds_to_turn(sonnet), (0, False))

    def test_a_cooldown_that_is_long_over_keeps_nobody_in_line(self):
        self.cool('rate_limited', 5)
        self.clock.now += 5 + cf.UNPROVED_S
        self.assertEqual([self.cooldowns.admit(self.slot(), n) for n in range(10)], [None] * 10)

    def test_a_server_that_could_not_be_reached_is_looked_at_each_second_by_those_who_wait(self):
        for _ in range(8):
            self.cool('unreachable')
            self.clock.now += 40
        self.assertEqual(self.cool('unreachable'), 64)
        ticket = self.wait_for()
        self.assertEqual(self.cooldowns.seconds_to_turn(ticket), (1, False))
        self.clock.now += 1
        self.assertEqual(self.cooldowns.seconds_to_turn(ticket), (0, False))
        self.assertEqual(self.left(), 63)         # for those to whom another server is left

    def test_a_hint_of_nothing_is_a_second(self):
        self.assertEqual((self.cool('rate_limited', 0), self.cool('rate_limited', 0.01)), (1, 1))
        self.assertEqual(self.cool('rate_limited', 50, self.b, limit_s=0), 0)

    def test_the_records_stay_bounded(self):
        with mock.patch.object(cf, 'MAX_COOLDOWNS', 10):
            for number in range(100):
                self.cool('throttled', model=f'model-{number}')
        self.assertLessEqual(len(self.cooldowns.snapshot()), 10)


# ==============================================================================
# Conversations
# ==============================================================================

class ConversationsTest(unittest.TestCase):
    def setUp(self):
        self.clock = FakeClock()
        self.conversations = cf.Conversations(self.clock)
        config = make_config('a', 'b')
        self.a, self.b = (cf.Attempt(key, OPUS) for key in config.keys.values())

    def serve(self, digest, attempt, lifetime_s=300, **usage):
        self.conversations.committed(digest, OPUS, attempt, 'order', lifetime_s, 'claude-code')
        self.conversations.finished(digest, OPUS, attempt.key.ref, usage)

    def test_a_conversation_is_known_by_its_session_else_by_how_it_begins(self):
        def digest(body, session=None, **options):
            return cf.conversation_digest({'x-claude-code-session-id': session},
                                          cf.dump_body(body))

        def user(user_id):
            return digest(messages_body(metadata={'user_id': user_id}))
        plain = messages_body()
        self.assertIsNone(digest(plain))
        self.assertEqual(digest(plain, 's1'), digest(messages_body(system='other'), 's1'))
        self.assertNotEqual(digest(plain, 's1'), digest(plain, 's2'))
        for form in ('{{"device_id":"d","session_id":"{}"}}', 'user_1_account__session_{}'):
            self.assertEqual(user(form.format('s1')), digest(plain, 's1'))
        for user_id in ('someone', '{"no": 1}', '{broken', '_session_', 5, None, {'a': 1}):
            self.assertIsNone(user(user_id), user_id)

    def test_marks_of_the_cache_move_and_change_no_conversation(self):
        mark = {'cache_control': {'type': 'ephemeral'}}
        longer = {'cache_control': {'type': 'ephemeral', 'ttl': '1h'}}
        system = [{'type': 'text', 'text': 'You are.', **mark}]
        hello = {'role': 'user', 'content': [{'type': 'text', 'text': 'first words'}]}
        marked = {'role': 'user', 'content': [{**hello['content'][0], **longer}]}
        turns = [{'role': 'assistant', 'content': 'ok'},
                 {'role': 'user', 'content': [{'type': 'text', 'text': 'x', **mark}]}]

        def digest(**fields):
            return cf.conversation_digest({}, json.dumps(messages_body(**fields)).encode())
        first = digest(system=system, messages=[marked])
        self.assertEqual(digest(system=system, messages=[hello, *turns]), first)
        self.assertNotEqual(digest(system=system,
                                   messages=[{**hello, 'role': 'assistant'}, *turns]), first)
        self.assertIsNone(digest(messages=[hello]))
        self.assertEqual(len(digest(system=system,
                                    messages=[{'role': 'user', 'content': 'y' * 10 ** 6}])), 16)

    def test_it_is_warm_as_long_as_its_cache_lives(self):
        self.serve('one', self.a)
        self.clock.now += 299
        self.assertEqual(self.conversations.find('one', OPUS).ref, 'anthropic:a')
        self.assertIsNone(self.conversations.find('one', SONNET))
        self.serve('one', self.a)
        self.clock.now += 300
        self.assertIsNone(self.conversations.find('one', OPUS))
        self.assertEqual(cf.cache_lifetime_s(b'{"ttl":"1h"}'), 3600)

    def test_moves_and_tokens_are_counted(self):
        self.serve('one', self.a, input_tokens=10, cache_read_input_tokens=0,
                   cache_creation_input_tokens=20_000)
        self.serve('one', self.a, input_tokens=10, cache_read_input_tokens=20_000,
                   cache_creation_input_tokens=500)
        self.serve('one', self.b, input_tokens=10, cache_read_input_tokens=0,
                   cache_creation_input_tokens=21_000)
        _, _, warm, left = self.conversations.snapshot()[0]
        self.assertEqual((warm.ref, warm.turns, warm.moves, warm.tokens, warm.read, warm.written,
                          left), ('anthropic:b', 3, 1, 21_010, 20_000, 41_500, 300))

    def test_the_least_recently_used_are_forgotten(self):
        with mock.patch.object(cf, 'MAX_CONVERSATIONS', 3):
            for digest in 'abcad':
                self.serve(digest, self.a)
        self.assertEqual([digest for digest, *_ in self.conversations.snapshot()], ['d', 'a', 'c'])

    def test_a_keys_load_is_its_conversations_and_the_tokens_of_a_minute(self):
        self.serve('one', self.a, input_tokens=1000, cache_read_input_tokens=9000)
        self.serve('two', self.a, input_tokens=500)
        self.serve(None, self.b, input_tokens=7)
        self.assertEqual((self.conversations.load('anthropic:a'),
                          self.conversations.load('anthropic:b')), ((2, 1500), (0, 7)))
        self.clock.now += 60
        self.assertEqual(self.conversations.load('anthropic:a'), (2, 0))
        self.clock.now += 240
        self.assertEqual(self.conversations.load('anthropic:a'), (0, 0))


# ==============================================================================
# Journal
# ==============================================================================

class JournalTest(ScratchTest):
    def setUp(self):
        super().setUp()
        self.log_path = os.path.join(self.folder, 'logs', 'x.log')

    def log(self, **options):
        log = cf.JsonLog(self.log_path, **options)
        self.addCleanup(log.close)
        return log

    def lines(self, path=None):
        with open(path or self.log_path) as file:
            return [json.loads(line) for line in file]

    def test_a_line_is_one_json_object_without_a_token(self):
        log = self.log(now=lambda: START)
        jwt = 'eyJhbGciOiJub25lIn0.eyJzdWIiOiIxMjM0NTY3ODkwIn0.c2lnbmF0dXJl'
        log.info('test', token=token_of('a'), nested={'x': [f'Bearer {jwt}']},
                 text='\x1b[31m\u2028\n')
        with open(self.log_path, 'rb') as file:
            data = file.read()
        self.assertEqual(data.count(b'\n'), 1)
        self.assertTrue(data.isascii())
        for secret in (token_of('a'), jwt, jwt.split('.')[1], '\x1b'):
            self.assertNotIn(secret.encode(), data)
        self.assertEqual(self.lines()[0]['time'], '2023-11-14T22:13:20.000Z')

    def test_lines_below_the_level_are_left_out(self):
        log = self.log(level='warn')
        log.info('no')
        log.error('yes')
        self.assertEqual([line['event'] for line in self.lines()], ['yes'])

    def test_logs_that_others_could_read_are_made_private_and_that_is_logged_once(self):
        folder = os.path.dirname(self.log_path)
        os.makedirs(folder)
        os.chmod(folder, 0o755)
        for path in (self.log_path, f'{self.log_path}.1'):
            with open(path, 'w'):
                pass
            os.chmod(path, 0o644)
        log = self.log()
        for _ in range(2):
            log.info('line')
        log.close()
        self.assertEqual([stat.S_IMODE(os.stat(path).st_mode)
                          for path in (self.log_path, f'{self.log_path}.1', folder)],
                         [0o600, 0o600, 0o700])
        self.assertEqual([(line['event'], line.get('path'), line.get('mode'))
                          for line in self.lines()],
                         [('line', None, None), ('made_private', self.log_path, '644'),
                          ('made_private', f'{self.log_path}.1', '644'),
                          ('made_private', folder, '755'), ('line', None, None)])

    def test_what_is_not_only_ours_keeps_its_mode(self):
        folder = os.path.dirname(self.log_path)
        os.makedirs(folder)
        with open(os.path.join(folder, 'of-another-program.log'), 'w'):
            pass
        os.chmod(folder, 0o755)
        os.symlink('/dev/null', self.log_path)
        with mock.patch('os.chmod') as chmod:
            self.log().info('line')
        chmod.assert_not_called()
        os.rename(folder, f'{folder}-elsewhere')
        os.unlink(os.path.join(f'{folder}-elsewhere', 'of-another-program.log'))
        os.symlink(f'{folder}-elsewhere', folder)
        with mock.patch('os.chmod') as chmod:
            self.log().info('line')
        chmod.assert_not_called()

    def test_the_file_is_rotated_and_private(self):
        log = self.log(max_bytes=4096)
        for number in range(100):
            log.info('line', number=number, text='x' * 60)
        numbers = [line['number'] for path in (self.log_path + '.1', self.log_path)
                   for line in self.lines(path)]
        self.assertEqual(numbers, list(range(numbers[0], 100)))
        self.assertLess(os.path.getsize(self.log_path), 4096 + 200)
        self.assertEqual(stat.S_IMODE(os.stat(self.log_path).st_mode), 0o600)

    def test_a_log_that_cannot_be_written_stops_nothing_and_comes_back(self):
        with open(os.path.join(self.folder, 'logs'), 'w'):
            pass
        log = self.log()
        log.info('lost')
        self.assertTrue(log.failed)
        os.unlink(os.path.join(self.folder, 'logs'))
        log.info('kept')
        self.assertFalse(log.failed)
        self.assertEqual([line['event'] for line in self.lines()], ['kept'])

    def test_a_disk_that_fills_up_within_a_line_leaves_none_of_it(self):
        log = self.log()
        log.info('whole')
        full, file = OSError(28, 'No space left on device'), log._file
        log._file = mock.Mock(write=mock.Mock(side_effect=lambda data: file.write(data[:7])),
                              truncate=file.truncate, close=file.close)
        log.info('in_pieces')         # a raw file may take less than it was given
        log._file.write.side_effect = [file.write(b'{"time'), full]
        log.info('lost')
        self.assertTrue(log.failed)
        log.info('kept')
        self.assertEqual([line['event'] for line in self.lines()], ['whole', 'in_pieces', 'kept'])

    def test_once_started_lines_are_written_by_a_thread_and_all_are_there_in_the_end(self):
        log = self.log()
        log.start()
        threads = [threading.Thread(target=lambda: [log.info('line') for _ in range(50)])
                   for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        log.close()
        self.assertEqual(len(self.lines()), 400)
        os.unlink(self.log_path)
        log.info('late')
        log.flush()
        self.assertFalse(os.path.exists(self.log_path))     # nor its folder, which may be gone

    def test_finished_requests_are_counted(self):
        metrics = cf.Metrics()
        attempts = [{'key': id, 'provider': 'anthropic', 'status': status}
                    for id, status in (('a', 429), ('b', 200))]
        for record in ({'outcome': 'answered', 'key': 'b', 'provider': 'anthropic',
                        'attempts': attempts, 'input_tokens': 7, 'fallback': 'x -> y',
                        'queued_ms': 5}, {'outcome': 'failed', 'attempts': []}):
            metrics.finished(record)
        counts, recent = metrics.snapshot()
        self.assertEqual(counts, {'requests': 2, 'answered': 1, 'failed': 1, 'refused': 0,
                                  'client_gone': 0, 'rotations': 1, 'fallbacks': 1, 'queued': 1,
                                  'input_tokens': 7, 'output_tokens': 0,
                                  'by_key': {'anthropic:b': 1}, 'by_provider': {'anthropic': 1}})
        self.assertEqual(recent[0]['outcome'], 'failed')

    def test_limits_are_kept_also_when_the_clock_was_set_back(self):
        clock = FakeClock(START)
        metrics = cf.Metrics(clock)
        for used, seconds in ((10, 0), (20, -3600)):
            clock.now += seconds
            metrics.note_limits('a', {'anthropic-ratelimit-requests-limit': '100',
                                      'anthropic-ratelimit-requests-remaining': str(100 - used)})
            self.assertEqual([round(limit.used, 2) for limit in metrics.limits('a')[1]],
                             [used / 100])

    def test_what_a_refusal_says_of_limits_is_not_lost(self):
        def windows(**used):
            return {f'anthropic-ratelimit-unified-{name}-{field}': value
                    for name, share in used.items()
                    for field, value in (('utilization', str(share)),
                                         ('reset', str(int(START) + 600)))}
        clock = FakeClock(START)
        metrics = cf.Metrics(clock)

        def told():
            return [(limit.name, limit.used) for limit in metrics.limits('a')[1]]
        metrics.note_limits('a', windows(**{'5h': 0.1}))
        metrics.note_limits('a', windows(**{'5h': 0.2, '7d_opus': 1}), is_refusal=True)
        self.assertEqual(told(), [('5h', 0.2), ('7d_opus', 1)])
        metrics.note_limits('a', windows(**{'5h': 0.1}))             # was sent before
        self.assertEqual(told(), [('5h', 0.2), ('7d_opus', 1)])
        for seconds, left in ((5, [('5h', 0.3), ('7d_opus', 1)]), (600, [('5h', 0.3)])):
            clock.now += seconds
            metrics.note_limits('a', windows(**{'5h': 0.3}))         # another model's
            metrics.note_limits('a', {'retry-after': '5'}, is_refusal=True)
            self.assertEqual(told(), left)

    def test_a_request_in_the_log_says_what_became_of_the_cache(self):
        record = {'event': 'request', 'method': 'POST', 'path': '/v1/messages', 'model': 'm',
                  'status': 200, 'duration_ms': 5, 'cache_read_input_tokens': 900,
                  'cache_creation_input_tokens': 70, 'conversation': 'ab12cd34', 'sticky': 'move',
                  'moved_because': 'rate_limited', 'attempts': [{'key': 'b', 'status': 200}]}
        self.assertEqual(cf.describe_record(record),
                         'POST /v1/messages m 200 in 5 ms: b 200, 900 tokens read from the cache, '
                         '70 written to it, conversation ab12cd34 moved: rate_limited')

    def test_the_last_hour_is_told_by_minutes(self):
        clock = FakeClock(60 * 1000)
        metrics = cf.Metrics(clock)

        def finish(outcome='answered', **fields):
            metrics.finished({'outcome': outcome, 'attempts': [{'key': 'a', 'provider': 'x'}],
                              **fields})
        for ttfb_ms in (30, 10, 20):
            finish(ttfb_ms=ttfb_ms)
        finish('failed')
        clock.now += 60
        finish(fallback='x -> y')
        finish('client_gone', queued_ms=5)
        first, second = metrics.history()
        self.assertEqual((first['minute'], first['answered'], first['failed'], first['rescued'],
                          first['ttfb_p50_ms'], first['ttfb_p95_ms']), (60_000, 3, 1, 0, 20, 30))
        self.assertEqual((second['minute'], second['answered'], second['client_gone'],
                          second['rescued']), (60_060, 1, 1, 1))
        self.assertNotIn('ttfb_p50_ms', second)
        clock.now += 60 * cf.HISTORY_MINUTES - 60
        self.assertEqual([minute['minute'] for minute in metrics.history()], [60_060])
        for _ in range(200):
            clock.now += 60
            finish()
        self.assertEqual((len(metrics.history()), len(metrics._minutes)),
                         (cf.HISTORY_MINUTES, cf.HISTORY_MINUTES))


# ==============================================================================
# Configuration store
# ==============================================================================

class ConfigStoreTest(ScratchTest):
    def store(self, document=None):
        if document is not None:
            self.write_config(document)
        store = cf.ConfigStore(self.path)
        store.load()
        return store

    def add(self, config, id='new'):
        return cf.add_key(config, cf.ANTHROPIC, token_of(id), id, 'now')[0]

    def touch(self, document):
        """Writes the file with a time of its own, as an edit a moment later would."""
        self.write_config(document)
        self.moment = getattr(self, 'moment', 0) + 1
        os.utime(self.path, (self.moment, self.moment))

    def test_a_file_that_is_not_there_means_the_defaults_and_is_made_by_an_edit(self):
        store = self.store()
        self.assertEqual(store.current.keys, {})
        store.update(self.add)
        self.assertEqual(self.read_config()['profiles'],
                         {'default': {'port': 4080, 'keyOrder': ['new']}})
        self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o600)
        self.assertEqual(stat.S_IMODE(os.stat(os.path.dirname(self.path)).st_mode), 0o700)

    def test_an_edit_keeps_what_was_changed_in_between(self):
        store = self.store(make_document('a'))
        self.touch(make_document('a', 'b', future=1))
        store.update(self.add)
        self.assertEqual(list(self.read_config()['keys']), ['a', 'b', 'new'])
        self.assertEqual(self.read_config()['future'], 1)

    def test_an_edit_is_done_again_when_the_file_changes_under_it(self):
        store = self.store(make_document('a'))
        rounds = []

        def edit(config):
            rounds.append(list(config.document['keys']))
            if len(rounds) == 1:
                self.touch(make_document('a', 'b'))
            return self.add(config)
        store.update(edit)
        self.assertEqual(rounds, [['a'], ['a', 'b']])
        self.assertEqual(list(self.read_config()['keys']), ['a', 'b', 'new'])

    def test_an_edit_follows_a_symbolic_link(self):
        store = self.store(make_document('a'))
        real = os.path.join(self.folder, 'dotfiles.json')
        os.rename(self.path, real)
        os.symlink(real, self.path)
        store.update(self.add)
        self.assertTrue(os.path.islink(self.path))
        self.assertIn('new', self.read_config()['keys'])

    def test_text_that_no_file_can_hold_is_refused_by_its_name(self):
        store = self.store(make_document('a'))
        for name, value in (('allowedHosts', ['x', '\ud800']), ('modelFallback', {'\ud800': 'x'}),
                            ('modelFallback', {'x': 'y\udfff'})):
            with self.subTest(name=name), self.assertRaisesRegex(
                    cf.ConfigError, rf'^{name}\.[^\ud800]*surrogate') as caught:
                store.update(lambda config, name=name, value=value: cf.change_settings(config, {
                    name: value}))
            self.assertEqual(caught.exception.details, {'field': name})
        self.write_config('{"keys": {"a": {"token": "%s", "label": "\\ud800"}}}' % token_of('a'))
        self.assertTrue(store.reload_if_changed())
        self.assertIn('keys.a.label holds half a character', store.problem)
        for read in (store.load, lambda: store.update(self.add)):
            with self.assertRaisesRegex(cf.ConfigError, 'keys.a.label holds half a character'):
                read()

    def test_a_file_that_is_gone_is_written_anew_with_all_that_is_in_force(self):
        for looks in (False, True):               # whether the loss was noticed before the edit
            store = self.store(make_document('a', accessToken='open-sesame', future=1))
            os.unlink(self.path)
            if looks:
                store.reload_if_changed()
            store.update(self.add)
            self.assertEqual((list(self.read_config()['keys']), self.read_config()['accessToken'],
                              self.read_config()['future']), (['a', 'new'], 'open-sesame', 1))
            self.assertEqual((store.current.access_token, store.problem), ('open-sesame', None))
            self.assertIn('was gone', ' '.join(store.take_notices()))

    def test_a_document_that_is_nested_too_deeply_is_refused(self):
        for depth, words in ((cf.MAX_NESTING + 1, 'field x is nested too deeply'),
                             (900, 'nested too deeply'), (200_000, 'nested too deeply')):
            for text in ('{"x": %s%s}' % ('[' * depth, ']' * depth),
                         '{"x": %s1%s}' % ('{"y": ' * depth, '}' * depth)):
                self.write_config(text)
                store = cf.ConfigStore(self.path)
                for read in (store.load, lambda store=store: store.update(self.add)):
                    with self.subTest(depth=depth, text=text[:10]), \
                            self.assertRaisesRegex(cf.ConfigError, words):
                        read()
        self.write_config('{"x": %s%s}' % ('[' * cf.MAX_NESTING, ']' * cf.MAX_NESTING))
        self.store().update(self.add)

    def test_a_broken_file_is_never_overwritten(self):
        store = self.store(make_document('a'))
        for broken in ('{"keys": ', '{"keys": []}', '\xff'):
            self.touch(broken)
            with self.subTest(broken=broken), self.assertRaises(cf.ConfigError):
                store.update(self.add)
            with open(self.path, encoding='utf-8') as file:
                self.assertEqual(file.read(), broken)

    def test_a_full_disk_loses_nothing(self):
        store = self.store(make_document('a'))
        before = self.read_config()
        with mock.patch('os.fsync', side_effect=OSError(28, 'No space left on device')):
            with self.assertRaisesRegex(cf.FailoverError, 'nothing was changed'):
                store.update(self.add)
        self.assertEqual((self.read_config(), list(store.current.keys)), (before, ['anthropic:a']))

    @unittest.skipUnless(hasattr(signal, 'SIGKILL'), 'there is no SIGKILL')
    def test_a_program_that_is_killed_while_it_saves_loses_nothing_and_bars_nobody(self):
        self.write_config(make_document('a'))
        before = self.read_config()
        for step in ('fsync', 'replace'):
            program = (f'import os, sys\nsys.path.insert(0, {HERE!r})\n'
                       f'import claude_failover as cf\n'
                       f'os.{step} = lambda *arguments: os.kill(os.getpid(), {signal.SIGKILL})\n'
                       f'cf.ConfigStore({self.path!r}).update(lambda config: '
                       f'cf.change_settings(config, {{"queueWaitMs": 5}}))')
            done = subprocess.run([sys.executable, '-c', program], capture_output=True, timeout=60)
            self.assertEqual((done.returncode, self.read_config()), (-signal.SIGKILL, before),
                             done.stderr)
        self.assertEqual(len(os.listdir(os.path.dirname(self.path))), 3)
        cf.remove_leftovers(self.path)
        self.assertEqual(os.listdir(os.path.dirname(self.path)), ['config.json'])
        self.store().update(self.add)
        self.assertEqual(list(self.read_config()['keys']), ['a', 'new'])

    def test_leftovers_are_looked_for_in_the_real_folder_and_others_files_stay(self):
        self.write_config(make_document('a'))
        link = os.path.join(self.folder, 'link', 'my.json')
        os.mkdir(os.path.dirname(link))
        os.symlink(self.path, link)
        folder = os.path.dirname(self.path)
        others = ['config.json', 'config.json.1.tmp', 'config.json.1.2.tmp.old',
                  'config.json.1.x.tmp', 'config.json.\u0661.2.tmp', 'config.json~',
                  'configXjson.1.2.tmp', 'my.json.1.2.tmp', 'old-config.json.1.2.tmp',
                  'running.json.1.2.tmp']
        for name in [*others[1:], 'config.json.1.2.tmp', 'config.json.4711.139776.tmp']:
            with open(os.path.join(folder, name).encode(), 'w'):
                pass
        os.mkdir(os.path.join(folder, 'config.json.3.4.tmp'))
        cf.remove_leftovers(link)
        self.assertEqual(sorted(map(os.fsencode, os.listdir(folder))),
                         sorted(name.encode() for name in [*others, 'config.json.3.4.tmp']))

    def test_a_changed_file_is_taken_up_once(self):
        store = self.store(make_document('a'))
        self.assertFalse(store.reload_if_changed())
        self.touch(make_document('a', 'b'))
        self.assertTrue(store.reload_if_changed())
        self.assertEqual(len(store.current.keys), 2)
        self.assertFalse(store.reload_if_changed())

    def test_a_wrong_or_vanished_file_leaves_the_old_configuration_in_force(self):
        store = self.store(make_document('a'))
        in_force = store.current
        for text, words in (('{"queueWaitMs": "x"}', 'queueWaitMs must be'),
                            ('{\n  "keys": }', 'line 2, column 11')):
            self.touch(text)
            self.assertTrue(store.reload_if_changed())
            self.assertIn(words, store.problem)
            self.assertIn(self.path, store.problem)
            self.assertIs(store.current, in_force)
        os.unlink(self.path)
        self.assertTrue(store.reload_if_changed())
        self.assertIn('is gone', store.problem)
        self.touch(make_document('a', 'b'))
        self.assertTrue(store.reload_if_changed())
        self.assertEqual((store.problem, len(store.current.keys)), (None, 2))

    def test_a_file_that_is_being_replaced_is_looked_at_again(self):
        store = self.store(make_document('a'))
        self.touch(make_document('a', 'b'))
        with mock.patch('builtins.open', side_effect=FileNotFoundError):
            self.assertFalse(store.reload_if_changed())
        self.assertEqual((len(store.current.keys), store.problem), (1, None))
        self.assertTrue(store.reload_if_changed())
        self.assertEqual(len(store.current.keys), 2)

    def test_a_file_whose_mode_cannot_be_changed_is_read_all_the_same(self):
        self.write_config(make_document('a'))
        os.chmod(self.path, 0o644)
        with mock.patch('os.chmod', side_effect=PermissionError(1, 'Operation not permitted')):
            store = self.store()
        self.assertEqual(len(store.current.keys), 1)
        self.assertIn(f'chmod go= {self.path}', ' '.join(store.take_notices()))

    def test_only_regular_files_are_made_private(self):
        with mock.patch('os.chmod') as chmod, \
                self.assertRaisesRegex(cf.ConfigError, 'not valid JSON'):
            cf.ConfigStore('/dev/null').load()
        chmod.assert_not_called()

    def test_a_byte_order_mark_is_no_error(self):
        self.assertEqual(len(self.store('\ufeff' + json.dumps(make_document('a'))).current.keys),
                         1)

    def test_a_file_that_others_could_read_is_made_private_and_that_is_said(self):
        self.write_config(make_document('a'))
        os.chmod(self.path, 0o644)
        store = self.store()
        self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o600)
        self.assertEqual(store.take_notices(),
                         [f'{self.path} was readable by others (mode 644); it is 600 now.'])
        self.assertEqual(store.take_notices(), [])

    def test_of_folders_only_the_usual_one_is_made_private(self):
        usual = os.path.expanduser(cf.DEFAULT_CONFIG_PATH)
        for path, mode in ((self.path, 0o755), (usual, 0o700)):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.chmod(os.path.dirname(path), 0o755)
            store = cf.ConfigStore(path)
            store.load()
            self.assertEqual(stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode), mode)
            self.assertEqual(len(store.take_notices()), mode == 0o700)
        os.rename(os.path.dirname(usual), self.folder + '/dotfiles')
        os.chmod(self.folder + '/dotfiles', 0o755)
        os.symlink(self.folder + '/dotfiles', os.path.dirname(usual))
        cf.ConfigStore(usual).load()
        self.assertEqual(stat.S_IMODE(os.stat(self.folder + '/dotfiles').st_mode), 0o755)

    def test_two_programs_that_edit_at_once_both_succeed(self):
        self.write_config(make_document('a'))
        stores = [cf.ConfigStore(self.path) for _ in range(8)]
        threads = [threading.Thread(target=store.update,
                                    args=(lambda config, n=n: self.add(config, f'k{n}'),))
                   for n, store in enumerate(stores)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        self.assertEqual(len(self.read_config()['keys']), 9)


# ==============================================================================
# State
# ==============================================================================

class StateTest(ScratchTest):
    """One program's parts, and after `restart` the next one's, with what the file told them."""

    def setUp(self):
        super().setUp()
        self.clock, self.document = FakeClock(), {**make_document('a', 'b'), **with_openai('o')}
        self.log, self.parts = mock.Mock(), None
        self.restart()

    def restart(self, seconds=0, document=None):
        """Saves, and starts anew some seconds later, at another reading of the monotonic clock."""
        if self.parts:
            self.state.save()
        self.document = document or self.document
        self.write_config(self.document)
        store, wall = cf.ConfigStore(self.path), self.clock.unix_s() + seconds
        store.load()
        self.clock = clock = FakeClock(50.0)
        self.clock.unix_s = lambda: wall + clock.now - 50
        self.cooldowns, self.metrics = cf.Cooldowns(clock, clock.unix_s), cf.Metrics(clock.unix_s)
        self.failover = cf.Failover(store, self.cooldowns, None,
                                    cf.Journal(self.log, self.metrics), None, clock, clock.unix_s)
        self.conversations, self.keys = self.failover.conversations, store.current.keys
        self.a, self.b, self.o = (self.keys.get(ref)
                                  for ref in ('anthropic:a', 'anthropic:b', 'openai:o'))
        self.parts = [self.cooldowns, self.conversations, self.metrics, self.failover]
        self.state = cf.State(store, self.log, self.parts)
        self.log.reset_mock()
        self.state.load()

    def cool(self, name, hint_s=None, key=None, limit_s=3600, provider=cf.ANTHROPIC, **outcome):
        key = key or self.a
        outcome = cf.Outcome(cf.find_cooling_rule(provider, name), 429, 'why', hint_s, **outcome)
        self.cooldowns.cool(key, cf.Slot(key.ref, OPUS, None, 'https://a.example'), outcome,
                            limit_s, 'd1')

    def cooling(self):
        return [(c.key.id, c.model, c.outcome.rule.name, round(left_s), c.digest)
                for c, left_s in self.cooldowns.snapshot()]

    def commit(self, digest='c1', key=None, lifetime_s=300):
        self.conversations.committed(digest, OPUS, cf.Attempt(key or self.a, SONNET), 'order',
                                     lifetime_s, 'claude-code')

    def saved(self):
        with open(self.state.path, encoding='utf-8') as file:
            return json.load(file)

    def put(self, saved):
        """Puts another file in place; what it was before stays that of this program."""
        with open(self.state.path, 'w', encoding='utf-8') as file:
            file.write(saved if isinstance(saved, str) else json.dumps(saved))
        os.chmod(self.state.path, 0o600)
        self.parts = None
        self.restart()

    def told(self):
        """[(level, why the state was ignored), ...]"""
        return [(call[0][0], call[1]['message']) for call in self.log.write.call_args_list
                if call[0][1] == 'state_ignored']

    def test_what_cools_goes_on_as_it_was(self):
        self.cool('rate_limited', 20, limit_fields=(('anthropic-ratelimit-x', '1'),))
        self.cool('auth_failed', key=self.b)
        self.cool('overloaded', key=self.o, provider=cf.OPENAI)
        self.cool('window_spent', 600, key=self.o, provider=cf.ANTHROPIC)
        for _ in range(3):
            self.cool('unreachable')
        self.assertEqual(len(self.cooldowns.snapshot()), 5)
        self.restart(0.25)
        self.assertEqual(self.cooling(), [
            ('a', None, 'unreachable', 1, 'd1'), ('o', OPUS, 'overloaded', 10, 'd1'),
            ('a', OPUS, 'rate_limited', 20, 'd1'), ('b', None, 'auth_failed', 300, 'd1')])
        limited = next(c for c, _ in self.cooldowns.snapshot() if c.model and c.key is self.a)
        self.assertEqual((limited.outcome.status, limited.outcome.message, limited.outcome.hint_s,
                          limited.outcome.limit_fields),
                         (429, 'why', 20, (('anthropic-ratelimit-x', '1'),)))
        self.assertIs(next(c for c, _ in self.cooldowns.snapshot() if c.key
                           is self.o).outcome.rule, cf.find_cooling_rule(cf.OPENAI, 'overloaded'))
        self.restart(5)
        self.assertEqual([left for *_, left, _ in self.cooling()], [5, 15, 295])
        self.assertEqual(self.told(), [])

    def test_a_first_start_tells_nothing(self):
        self.assertEqual(self.told(), [])
        self.assertFalse(os.path.exists(self.state.path))

    def test_repeats_go_on_doubling(self):
        for left in (300, 600):
            self.cool('auth_failed')
            self.assertEqual(self.cooling()[0][3], left)
            if left == 300:
                self.clock.now += 299
                self.restart(0.5)
                self.clock.now += 0.6

    def test_a_last_hope_is_asked_as_seldom_as_before_and_an_old_cooldown_at_once(self):
        slot = cf.Slot('anthropic:a', OPUS)
        for name, seconds, asked in (('window_spent', 0, [299, 1]), ('auth_failed', 0, [0, 5]),
                                     ('window_spent', 86400, [0, 599])):
            with self.subTest(rule=name, seconds=seconds):
                os.path.exists(self.state.path) and os.unlink(self.state.path)
                self.parts = None
                self.restart()
                self.cool(name, 2 * 86400,
                          limit_s=3 * 86400) if name == 'window_spent' else self.cool(name)
                self.restart(seconds)
                for step in asked[:-1]:
                    self.clock.now += step
                    self.assertEqual(self.cooldowns.last_hope([slot]), None if step else slot)
                self.restart(0.5)
                self.clock.now += asked[-1] - 1
                self.assertIsNone(self.cooldowns.last_hope([slot]))
                self.clock.now += 2
                self.assertEqual(self.cooldowns.last_hope([slot]), slot)

    def test_what_ended_meanwhile_is_left_out(self):
        self.cool('rate_limited', 20)
        self.cooldowns.note_paid('anthropic:a', 100)
        self.cooldowns.note_paid('anthropic:b', 1000)
        self.commit()
        self.restart(301)
        self.assertEqual((self.cooling(), self.conversations.snapshot(), self.cooldowns.paid()),
                         ([], [], {'anthropic:b'}))
        self.assertTrue(self.cooldowns.is_empty)

    def test_a_clock_that_was_set_back_makes_no_cooldown_longer(self):
        self.cool('rate_limited', 20)
        self.cooldowns._now = lambda unix_s=self.clock.unix_s(): unix_s
        self.restart(-86400)
        self.assertEqual(self.cooling(), [('a', OPUS, 'rate_limited', 20, 'd1')])

    def test_a_conversation_stays_where_it_is_warm(self):
        self.commit()
        self.conversations.finished('c1', OPUS, 'anthropic:a',
                                    {'input_tokens': 5, 'cache_read_input_tokens': 7})
        self.clock.now += 10
        before = self.conversations.find('c1', OPUS)
        self.restart(90)
        warm = self.conversations.find('c1', OPUS)
        self.assertEqual(warm._replace(until=0, since=0), before._replace(until=0, since=0))
        self.assertEqual((warm.tokens, round(warm.until - self.clock.now),
                          round(self.clock.now - warm.since)), (12, 200, 100))
        self.assertEqual(self.conversations.load('anthropic:a'), (1, 0))

    def test_counters_limits_repairs_and_makers_are_kept(self):
        self.metrics.finished({'outcome': 'answered', 'key': 'a', 'provider': 'anthropic',
                               'attempts': [], 'input_tokens': 7})
        self.metrics.note_limits('anthropic:a', {
            'anthropic-ratelimit-unified-5h-utilization': '0.5',
            'date': 'Tue, 14 Nov 2023 22:13:20 GMT', 'set-cookie': 'secret',
            'anthropic-ratelimit-input-tokens-limit': '50', 'anthropic-organization-id': 'org'})
        self.failover.repairs[SONNET] = (cf.Needed('beta', 'x-2025-01-01'),)
        self.failover.repairs['https://o.example', 'gpt'] = (cf.Needed('parameter', 'top_p'),)
        self.failover.makers['file_1'] = 'anthropic:b'
        counted, limits = self.metrics.snapshot()[0], self.metrics.limits('anthropic:a')
        self.restart(60)
        self.assertEqual((self.metrics.snapshot()[0], self.metrics.limits('anthropic:a')),
                         (counted, limits))
        self.assertEqual((self.metrics.token_limit('anthropic:a'),
                          self.metrics.organization('anthropic:a')), (50, 'org'))
        self.assertEqual(self.failover.repairs, {SONNET: (('beta', 'x-2025-01-01'),), (
            'https://o.example', 'gpt'): (('parameter', 'top_p'),)})
        self.assertEqual(self.failover.makers.get('file_1'), 'anthropic:b')
        self.assertNotIn('secret', json.dumps(self.saved()))
        self.restart(8 * 86400)
        self.assertEqual(self.metrics.limits('anthropic:a'), (None, []))

    def fill(self):
        for key in (self.a, self.b):
            self.cool('rate_limited', 600, key)
            self.commit(key.ref, key)
            self.metrics.note_limits(key.ref,
                                     {'anthropic-ratelimit-unified-5h-utilization': '0.5'})
            self.failover.makers[key.id] = key.ref
            self.metrics.finished({'outcome': 'answered', 'key': key.id, 'provider': 'anthropic',
                                   'attempts': []})

    def kept(self):
        """The ids of the keys of which something is known, by part."""
        refs = [{c.key.ref for c, _ in self.cooldowns.snapshot()},
                {warm.ref for *_, warm, _ in self.conversations.snapshot()},
                set(self.metrics._limits), set(self.failover.makers.values()),
                set(self.metrics.snapshot()[0]['by_key'])]
        return [''.join(sorted(ref[-1] for ref in of_part)) for of_part in refs]

    def test_what_is_of_another_key_token_or_server_is_left_out(self):
        changed, moved = copy.deepcopy(self.document), copy.deepcopy(self.document)
        changed['keys']['a']['token'] = token_of('fresh')
        moved['keys']['a']['baseUrl'] = 'https://other.example'
        for document, kept in ((make_document('b'), 'b'), (changed, 'b'), (moved, 'b'),
                               (make_document('c'), ''),
                               ({**self.document, 'anthropicBaseUrl': 'https://other.example'},
                                ''), (self.document, 'ab')):
            with self.subTest(document=document):
                self.fill()
                self.restart(1, document)
                self.assertEqual(self.kept(), [kept] * 5)
                self.assertEqual([message for _, message in self.told()], [
                    'ValueError: of another configuration'] if 'c' in document['keys'] else [])
                self.parts = None
                os.unlink(self.state.path)
                self.restart(0, {**make_document('a', 'b'), **with_openai('o')})

    def test_the_file_is_private_and_holds_no_token(self):
        self.fill()
        outcome = cf.Outcome(rule('throttled'), 429, f'no more for {token_of("a")}', 9)
        self.cooldowns.cool(self.a, cf.Slot(self.a.ref, SONNET), outcome, 3600)
        self.state.save()
        self.assertEqual(stat.S_IMODE(os.stat(self.state.path).st_mode), 0o600)
        with open(self.state.path, encoding='utf-8') as file:
            text = file.read()
        for token in (token_of('a'), token_of('b'), openai_token_of('o')):
            self.assertNotIn(token[:20], text)

    def test_a_file_that_cannot_be_believed_is_one_line_in_the_log(self):
        self.fill()
        self.state.save()
        good = self.saved()
        entry, warm = good['cooldowns'][0], good['conversations'][0]
        for wrong in ('', '{', '[]', '[' * 100_000, '{"version": 1}', {**good, 'version': 2},
                      {**good, 'keys': []},
                      {**good, 'cooldowns': [{**entry, 'place': [[], None, None, None]}, {}]},
                      {**good, 'cooldowns': {}, 'paid': 5},
                      {**good, 'cooldowns': [{**entry, 'until': 'x'}]},
                      {**good, 'cooldowns': [{**entry, 'asked': None}]},
                      {**good, 'cooldowns': [{**entry, 'key': []}]},
                      {**good, 'conversations': [{**warm, 'tokens': 'many'}]},
                      {**good, 'conversations': [{**warm, 'tokens': float('inf')}]},
                      {**good, 'counters': [['requests', None]]},
                      {**good, 'limits': [['anthropic:a', 'x', {}]]},
                      {**good, 'repairs': [[SONNET, [['beta']]]]}):
            with self.subTest(wrong=str(wrong)[:200]):
                self.put(wrong)
                self.assertEqual([level for level, _ in self.told()], ['warn'])
                self.fill()
                self.restart()
                self.assertEqual((self.kept(), self.told()), (['ab'] * 5, []))
        self.put(good)
        os.chmod(self.state.path, 0o640)
        self.parts = None
        self.restart()
        self.assertEqual((self.kept(), self.told()),
                         ([''] * 5, [('warn', 'ValueError: others may read it')]))
        self.put(good)
        self.parts = None
        with mock.patch.object(cf, 'MAX_STATE_BYTES', 100):
            self.restart()
        self.assertEqual((self.kept(), len(self.told())), ([''] * 5, 1))
        os.unlink(self.state.path)
        os.mkdir(self.state.path)
        self.restart()
        self.assertEqual(len(self.told()), 1)

    def test_nonsense_of_the_right_shape_does_no_harm(self):
        self.fill()
        self.state.save()
        good = self.saved()
        entry, warm = good['cooldowns'][0], good['conversations'][0]
        for name, values in (('until', (float('nan'), float('inf'), -1)),
                             ('length_s', (float('nan'), float('inf'), -1, 1e300)),
                             ('outcome', (['gone', 429, 'why', None, []],
                                          ['answered', 429, 'why', None, []])),
                             ('place', (['anthropic:b', None, None, None],)),
                             ('key', ('anthropic:gone', None))):
            for value in values:
                self.put({**good, 'cooldowns': [{**entry, name: value}],
                          'repairs': [[SONNET, [['gone', 'x']]]], 'conversations': [
                              {**warm, 'until': float('nan')},
                              {**warm, 'until': float('inf')}, {**warm, 'until': 1e300}]})
                self.assertEqual((self.told(), self.conversations.snapshot(),
                                  self.failover.repairs), ([], [], {}))
                for cooling, left_s in self.cooldowns.snapshot():
                    self.assertLessEqual(left_s, 600, (name, value))
                    cf.cooldown_health(cooling, [], *self.cooldowns.remaining_s(cooling))
                    cf.format_duration(self.cooldowns.remaining_s(cooling)[1])

    def test_it_is_saved_when_something_changed_and_only_then(self):
        self.assertFalse(os.path.exists(self.state.path))
        slot = cf.Slot('anthropic:a', OPUS)
        for change, saves in (
                (lambda: None, 0), (self.commit, 1), (lambda: self.cool('auth_failed'), 1),
                (lambda: self.cooldowns.last_hope([slot]), 1), (self.cooldowns.clear, 1),
                (lambda: self.metrics.finished({'outcome': 'failed', 'attempts': []}), 1),
                (lambda: None, 0)):
            with mock.patch.object(cf, 'write_atomically') as write:
                change()
                self.state.save()
                self.state.save()
            self.assertEqual(write.call_count, saves)

    def test_a_full_disk_is_told_once_and_tried_again(self):
        self.log.reset_mock()
        for outcome in (OSError(28, 'No space left on device'),
                        OSError(28, 'No space left on device'), None):
            with mock.patch.object(cf, 'write_atomically', side_effect=outcome) as write:
                self.commit()
                self.state.save()
            self.assertEqual(write.call_count, 1)
        self.log.warn.assert_called_once_with('state_not_saved', path=self.state.path,
                                              message='No space left on device')

    def test_much_of_it_is_saved_more_seldom(self):
        with mock.patch.object(cf.time, 'monotonic', iter((0, 0.5)).__next__):
            self.commit(lifetime_s=5)
            self.state.save()
        self.assertEqual(self.state.pause_s, 25)
        self.commit()
        self.state.save()
        self.assertLessEqual(self.state.pause_s, 25)

    def test_the_records_stay_bounded(self):
        for number in range(20):
            self.commit(f'c{number}')
        self.state.save()
        with mock.patch.object(cf, 'MAX_CONVERSATIONS', 10):
            self.parts = None
            self.restart()
        self.assertEqual([digest for digest, *_ in self.conversations.snapshot()],
                         [f'c{number}' for number in range(19, 9, -1)])


# ==============================================================================
# Exchanges
# ==============================================================================

class ExchangesTest(unittest.TestCase):
    def pair(self):
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(theirs.close)
        return ours, theirs

    def setUp(self):
        self.clock = FakeClock()
        self.client, self.clients_end = self.pair()
        self.upstream, self.upstreams_end = self.pair()
        self.exchange = cf.Exchange(self.client, self.clock)
        self.exchange.attach(self.upstream, 60)
        self.watcher = cf.Watcher(self.clock)

    def test_a_client_that_leaves_ends_its_upstream(self):
        self.watcher.sweep([self.exchange])
        self.assertFalse(self.exchange.gone)
        self.clients_end.close()
        self.watcher.sweep([self.exchange])
        self.assertTrue(self.exchange.gone and self.exchange.wake.is_set())
        self.assertEqual(self.upstreams_end.recv(1), b'')
        with self.assertRaises(cf.ClientGone):
            self.exchange.check()

    def test_a_client_that_sends_its_next_request_early_stays_until_it_leaves(self):
        self.clients_end.send(b'GET ')
        self.watcher.sweep([self.exchange])
        self.assertFalse(self.exchange.gone)
        self.clients_end.close()
        self.watcher.sweep([self.exchange])
        self.assertEqual(self.exchange.gone,
                         hasattr(select, 'POLLRDHUP'))  # Linux sees past the bytes

    def test_without_rdhup_a_look_at_the_next_byte_tells(self):
        with mock.patch.object(cf, 'select', mock.Mock(spec=['poll', 'POLLIN'], poll=select.poll,
                                                       POLLIN=select.POLLIN)):
            self.watcher.sweep([self.exchange])
            self.assertFalse(self.exchange.gone)
            self.clients_end.close()
            self.watcher.sweep([self.exchange])
        self.assertTrue(self.exchange.gone)

    def test_a_silent_upstream_is_ended_at_its_deadline(self):
        self.clock.now += 59
        self.exchange.extend(300)
        self.clock.now += 299
        self.watcher.sweep([self.exchange])
        self.assertFalse(self.exchange.timed_out)
        self.clock.now += 2
        self.watcher.sweep([self.exchange])
        self.assertEqual(self.upstreams_end.recv(1), b'')
        with self.assertRaises(cf.UpstreamTimeout):
            self.exchange.check()

    def test_a_detached_upstream_is_let_alone(self):
        self.exchange.detach()
        self.exchange.client_left()
        self.upstream.send(b'x')
        self.assertEqual(self.upstreams_end.recv(1), b'x')

    def test_the_thread_notices_by_itself(self):
        watcher = cf.Watcher()
        watcher.start()
        with watcher.watching(self.exchange):
            self.assertEqual(len(watcher), 1)
            self.clients_end.close()
            self.assertTrue(self.exchange.wake.wait(PATIENCE_S))
        self.assertEqual(len(watcher), 0)


# ==============================================================================
# HTTP messages
# ==============================================================================

class HttpMessagesTest(unittest.TestCase):
    def read_chunks(self, data, size, **limits):
        """(body, what stands behind it, whether it ended, why not) of one in pieces."""
        reader, body, fed = cf.ChunkReader(**limits), b'', pieces(data, size)
        try:
            while fed and not reader.ended:
                body += reader.feed(fed.pop(0))
        except cf.BadChunks as error:
            return None, b'', False, str(error)
        return body, (reader.rest if reader.ended else b'') + b''.join(fed), reader.ended, None

    def test_a_body_comes_out_of_its_chunks_wherever_pieces_end(self):
        for data, wanted in ((b'0\r\n\r\n', (b'', b'', True, None)),
                             (b'3\r\nhel\r\n02 ;x="y"\r\nlo\r\n0\r\nT: x\r\n\r\nGET /',
                              (b'hello', b'GET /', True, None)),
                             (b'4\r\n\r\n\r\n\r\n00;x\r\n' + b'T: x\r\n' * (cf.MAX_FIELDS - 1)
                              + b'\r\n', (b'\r\n\r\n', b'', True, None)),
                             (b'5\r\nhello\r\n0\r\n', (b'hello', b'', False, None)),
                             (b'9\r\nhello', (b'hello', b'', False, None))):
            for size in (*range(1, 30), len(data)):
                with self.subTest(data=data[:40], size=size):
                    self.assertEqual(self.read_chunks(data, size), wanted)

    def test_what_is_no_chunk_is_found_wherever_pieces_end(self):
        for data, reason in (
                (b'\r\n', 'hexadecimal'), (b'x\r\n', 'hexadecimal'), (b'-1\r\n', 'hexadecimal'),
                (b'0x1\r\n', 'hexadecimal'), (b' 1\r\n', 'hexadecimal'),
                (b'100000000\r\n', 'hexadecimal'), (b'1\nx\r\n', 'hexadecimal'),
                (b'1;\0\r\n', 'hexadecimal'), (b'2\r\nabc\r\n', 'where its size says'),
                (b'2\r\nab\n\r\n', 'where its size says'), (b'2\r\nab\rx', 'where its size says'),
                (b'1' * (cf.MAX_LINE_BYTES + 1), 'too long'),
                (b'0\r\n' + b'T: x\r\n' * cf.MAX_FIELDS, 'trailers')):
            for size in (1, 2, 3, 7, len(data)):
                with self.subTest(data=data[:20], size=size):
                    self.assertRegex(self.read_chunks(data, size)[3], reason)

    def test_limits_are_met_exactly(self):
        data = b'3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n'
        for limits, reason in (({'max_bytes': 5, 'max_chunks': 3}, None),
                               ({'max_bytes': 4}, 'too large'),
                               ({'max_chunks': 2}, 'more than 2')):
            body, _, ended, told = self.read_chunks(data, 4, **limits)
            self.assertEqual((body, ended), (None, False) if reason else (b'hello', True))
            self.assertIn(reason or '', told or '')


# ==============================================================================
# Client connections
# ==============================================================================

REQUEST = (b'POST /v1/messages?beta=true HTTP/1.1\r\nHost: localhost:4080\r\n'
           b'Content-Type: application/json\r\n'
           b'X-Api-Key: k \r\nContent-Length: 5\r\n\r\nhello')
CHUNKED = (b'POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n'
           b'3\r\nhel\r\n2;note=x\r\nlo\r\n0\r\nTrailer: x\r\n\r\n')


class SocketTest(unittest.TestCase):
    """Feeds bytes to a reader from another thread, in pieces."""

    def fed(self, data, size=None):
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)

        def feed():
            with theirs, contextlib.suppress(OSError):        # a refused request is not read on
                for piece in pieces(data, size or max(1, len(data))):
                    theirs.sendall(piece)
        thread = threading.Thread(target=feed, daemon=True)
        thread.start()
        self.addCleanup(thread.join, PATIENCE_S)
        return ours


def make_socket(receive):
    """A pretend socket that receives what `receive(size)` gives."""
    def receive_into(view):
        data = receive(len(view))
        view[:len(data)] = data
        return len(data)
    return mock.Mock(recv=receive, recv_into=receive_into)


class ClientConnectionsTest(SocketTest):
    def connection(self, data, size=None):
        with mock.patch.object(socket, 'TCP_NODELAY', socket.SO_KEEPALIVE), \
                mock.patch.object(socket, 'IPPROTO_TCP', socket.SOL_SOCKET):   # a pair is not TCP
            return cf.ClientConnection(self.fed(data, size))

    def read(self, data, size=None):
        connection = self.connection(data, size)
        head = connection.read_head()
        return head, bytes(connection.read_body(head)), connection

    def test_reads_may_fall_anywhere(self):
        for data in (REQUEST, CHUNKED):
            for size in (*range(1, 40), len(data)):
                with self.subTest(size=size, data=data[:30]):
                    head, body, connection = self.read(data + REQUEST, size)
                    self.assertEqual((head.method, body), ('POST', b'hello'))
                    self.assertEqual(connection.read_head().target, '/v1/messages?beta=true')

    def test_a_head_keeps_names_values_and_order(self):
        head, _, _ = self.read(REQUEST)
        self.assertEqual(head.fields[2][:2], ('X-Api-Key', 'k'))
        self.assertEqual(head.headers['content-type'], 'application/json')
        self.assertTrue(head.keeps_alive)

    def test_keeping_the_connection_follows_version_and_connection_field(self):
        for line, field, kept in (('HTTP/1.1', '', True), ('HTTP/1.1', 'Connection: Close\r\n',
                                                           False), ('HTTP/1.0', '', False),
                                  ('HTTP/1.0', 'Connection: keep-alive\r\n', True)):
            head, _, _ = self.read(f'GET / {line}\r\n{field}\r\n'.encode())
            self.assertEqual(head.keeps_alive, kept)

    def test_what_two_readers_could_read_differently_is_refused(self):
        post = b'POST /v1/messages HTTP/1.1\r\nHost: x\r\n'
        for data, status in (
                (b'GET /\r\n\r\n', 400),
                (b'GET / HTTP/2.0\r\n\r\n', 400), (b'GET  / HTTP/1.1\r\n\r\n', 400),
                (b'get / HTTP/1.1\r\n\r\n', 400), (b'GET / HTTP/1.1\nHost: x\n\n', 400),
                (b'GET / HTTP/1.1\r\nHost: x\n\r\n\r\n', 400), (b'BREW / HTTP/1.1\r\n\r\n', 501),
                (b'CONNECT x:443 HTTP/1.1\r\n\r\n', 501), (b'TRACE / HTTP/1.1\r\n\r\n', 501),
                (b'GET http://x/ HTTP/1.1\r\n\r\n', 400), (b'GET //x/ HTTP/1.1\r\n\r\n', 400),
                (b'GET /a/../b HTTP/1.1\r\n\r\n', 400), (b'GET /a/%2E%2e/b HTTP/1.1\r\n\r\n', 400),
                (b'GET /a/..%2fb HTTP/1.1\r\n\r\n', 400), (b'GET /a\\b HTTP/1.1\r\n\r\n', 400),
                (b'GET /a#b HTTP/1.1\r\n\r\n', 400), (b'GET /\xe9 HTTP/1.1\r\n\r\n', 400),
                (post + b'Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello', 400),
                (post + b'Content-Length: +5\r\n\r\nhello', 400),
                (post + b'Content-Length: 0x5\r\n\r\nhello', 400),
                (post + b'Content-Length: 5, 5\r\n\r\nhello', 400),
                (post + b'Content-Length: \xb2\r\n\r\nhello', 400),
                (post + b'Content-Length: 9999999999999999999\r\n\r\n', 400),
                (post + b'Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n', 400),
                (post + b'Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n', 400),
                (post + b'Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n'
                 b'0\r\n\r\n', 400),
                (b'POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n', 400),
                (post + b'Name : value\r\n\r\n', 400), (post + b' folded: x\r\n\r\n', 400),
                (post + b'A: b\r\n c\r\n\r\n', 400), (post + b'A: b\x00c\r\n\r\n', 400),
                (post + b'A: b\rc\r\n\r\n', 400), (post + b'no colon\r\n\r\n', 400),
                (post + b': empty\r\n\r\n', 400), (post + b'Expect: 200-maybe\r\n\r\n', 417),
                (post + b'A: b\r\n' * 101 + b'\r\n', 431),
                (post + b'A: ' + b'b' * 17_000 + b'\r\n\r\n', 431),
                (post + b'A: ' + b'b' * 70_000 + b'\r\n\r\n', 431),
                (post + (b'A: ' + b'b' * 1000 + b'\r\n') * 70, 431),
                (post + b'Transfer-Encoding: chunked\r\n\r\nxyz\r\n', 400),
                (post + b'Transfer-Encoding: chunked\r\n\r\n-1\r\n', 400),
                (post + b'Transfer-Encoding: chunked\r\n\r\n3\r\nhello\r\n', 400),
                (post + b'Transfer-Encoding: chunked\r\n\r\n3\r\nhelxx0\r\n\r\n', 400),
                (post + b'Transfer-Encoding: chunked\r\n\r\n' + b'1' * 17_000, 400),
                (post + b'Transfer-Encoding: chunked\r\n\r\n0\r\n' + b'T: x\r\n' * 101, 400),
                (post + b'Transfer-Encoding: chunked\r\n\r\n7ffffff\r\n', 413)):
            with self.subTest(data=data[:120]):
                with self.assertRaises(cf.BadRequest) as caught:
                    self.read(data)
                self.assertEqual(caught.exception.status, status)

    def test_a_field_of_spaces_costs_no_time_worth_mentioning(self):
        head, _, _ = self.read(b'GET / HTTP/1.1\r\nA:' + b' ' * 16_000 + b'\r\n\r\n')
        self.assertEqual(head.headers['a'], '')

    def test_a_head_that_comes_byte_by_byte_is_searched_once(self):
        data = b'GET / HTTP/1.1\r\nA: ' + b'b' * 3000 + b'\r\n\r\n'
        connection = cf.ClientConnection(make_socket(mock.Mock(side_effect=pieces(data, 1))))
        with mock.patch.object(cf, 'BARE_LF') as searched:
            searched.search.side_effect = lambda buffer, start=0: sizes.append(len(buffer) - start)
            sizes = []
            connection.read_head()
        self.assertLess(sum(sizes), len(data))
        connection = cf.ClientConnection(
            mock.Mock(recv=mock.Mock(side_effect=pieces(data.replace(b'b\r\n', b'b\n'), 1))))
        with self.assertRaisesRegex(cf.BadRequest, 'must end in CR LF'):
            connection.read_head()

    def test_line_ends_before_and_after_a_request_are_no_request(self):
        data = b'\r\n' + REQUEST + b'\r\n\r\n'
        for size in (1, len(data)):
            connection = cf.ClientConnection(
                make_socket(mock.Mock(side_effect=[*pieces(data, size), b''])))
            head = connection.read_head()
            self.assertEqual((head.method, connection.read_body(head)), ('POST', b'hello'))
            self.assertIsNone(connection.read_head())

    def test_line_ends_alone_do_not_keep_a_connection(self):
        clock = FakeClock(START)

        def line_end(size):
            clock.now += 15
            return b'\r\n' if clock.now < START + 100 * cf.CLIENT_IDLE_S else b''
        self.assertIsNone(cf.ClientConnection(mock.Mock(recv=line_end), clock).read_head())
        self.assertLess(clock.now - START, cf.CLIENT_IDLE_S + 2 * cf.CLIENT_READ_S)

    def test_a_body_of_too_many_chunks_is_refused(self):
        with mock.patch.object(cf, 'MAX_CHUNKS', 2), \
                self.assertRaisesRegex(cf.BadRequest, 'more than 2 chunks'):
            self.read(CHUNKED)

    def test_a_large_body_comes_whole_however_it_is_cut(self):
        body = bytes(range(256)) * 12_000             # three times what is prepared for it
        for size in (1_000_000, cf.PREPARED_BYTES, 65_537):
            left = bytearray(b'POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n' % len(body) + body)

            def receive(wanted, left=left, size=size):
                data = bytes(left[:min(wanted, size)])
                del left[:len(data)]
                return data
            connection = cf.ClientConnection(make_socket(receive))
            self.assertEqual(connection.read_body(connection.read_head()), body)

    def test_a_length_alone_takes_no_memory(self):
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        with self.assertRaises(cf.ClientGone):
            self.read(b'POST / HTTP/1.1\r\nContent-Length: 30000000\r\n\r\nx')
        self.assertLess(tracemalloc.get_traced_memory()[1], 2_000_000)

    def test_a_client_that_leaves_within_a_request_is_gone(self):
        for cut in (20, len(REQUEST) - 2):
            with self.subTest(cut=cut), self.assertRaises(cf.ClientGone):
                self.read(REQUEST[:cut])
        self.assertIsNone(self.connection(b'').read_head())

    def test_a_slow_head_is_refused_in_the_end(self):
        clock = FakeClock()
        connection = cf.ClientConnection(mock.Mock(recv=lambda size: b'G'), clock)

        def slow_receive(size):
            clock.now += 2
            return b'G'
        connection.sock.recv = slow_receive
        with self.assertRaises(cf.BadRequest) as caught:
            connection.read_head()
        self.assertEqual(caught.exception.status, 408)

    def test_a_silent_client_is_refused_within_a_request_and_let_go_between_two(self):
        clock = FakeClock()
        for sent, outcome in ((REQUEST[:20], 408), (REQUEST[:-2], 408), (CHUNKED[:-9], 408),
                              (b'', None)):
            def silent_receive(size, left=[sent]):                # noqa: B006 - made anew for each
                if left[0]:
                    data, left[0] = left[0], b''
                    return data
                clock.now += cf.CLIENT_READ_S
                raise BlockingIOError
            connection = cf.ClientConnection(make_socket(silent_receive), clock)
            began = clock.now
            with self.subTest(sent=sent):
                if outcome is None:
                    self.assertIsNone(connection.read_head())
                    self.assertEqual(clock.now - began, cf.CLIENT_IDLE_S + cf.CLIENT_READ_S)
                    continue
                with self.assertRaises(cf.BadRequest) as caught:
                    connection.read_body(connection.read_head())
                self.assertEqual((caught.exception.status, clock.now - began),
                                 (outcome, cf.CLIENT_READ_S))

    def test_a_client_that_sends_its_body_drop_by_drop_is_refused_in_the_end(self):
        clock = FakeClock()

        def slow_receive(size):
            clock.now += 19
            return b'x'
        connection = cf.ClientConnection(make_socket(slow_receive), clock)
        connection._buffer += b'POST / HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n'
        head = connection.read_head()
        with self.assertRaises(cf.BadRequest) as caught:
            connection.read_body(head)
        self.assertEqual(caught.exception.status, 408)
        self.assertLess(clock.now - 1000, cf.CLIENT_BODY_S + cf.CLIENT_READ_S)

    def test_a_client_that_does_not_read_its_answer_is_given_up(self):
        near, far = socket.socketpair()
        self.addCleanup(near.close)
        self.addCleanup(far.close)
        with mock.patch.multiple(socket, TCP_NODELAY=socket.SO_KEEPALIVE,
                                 IPPROTO_TCP=socket.SOL_SOCKET):
            connection = cf.ClientConnection(near)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO,
                        struct.pack('ll', 0, 1000))     # instead of minutes
        with self.assertRaises(cf.ClientGone):
            connection.send(bytes(10_000_000))

    @unittest.skipIf(os.name == 'nt', 'Windows has them in milliseconds')
    def test_the_kernel_ends_reads_and_writes_that_take_too_long(self):
        connection = self.connection(b'')
        for option, seconds in ((socket.SO_RCVTIMEO, cf.CLIENT_READ_S),
                                (socket.SO_SNDTIMEO, cf.CLIENT_WRITE_S)):
            self.assertEqual(
                struct.unpack('ll', connection.sock.getsockopt(socket.SOL_SOCKET, option, 16)),
                (seconds, 0))

    def response(self, method='GET', minor_version=1):
        connection = FakeConnection()
        head = cf.RequestHead(method, '/', minor_version, [], {})
        return cf.ClientResponse(connection, head), connection

    def test_an_answer_has_the_date_that_it_came_with_or_ours(self):
        head = cf.RequestHead('GET', '/', 1, [], {})
        for given, date in (([], 'Thu, 01 Jan 2026 00:00:59 GMT'),
                            ([('Date', 'long ago')], 'long ago'),
                            ([('update', 'x')], 'Thu, 01 Jan 2026 00:00:59 GMT')):
            for way in ('send', 'start'):
                connection = FakeConnection()
                response = cf.ClientResponse(connection, head, now=lambda: 1767225659.9)
                getattr(response, way)(200, given)
                response.flush()
                with self.subTest(given=given, way=way):
                    self.assertEqual([value for name, value in Answered(connection.data).fields
                                      if name.lower() == 'date'], [date])

    def test_a_head_and_its_first_piece_leave_together(self):
        response, connection = self.response()
        response.start(200, [('a', 'b')])
        self.assertEqual(connection.data, b'')
        response.write(b'hello')
        self.assertTrue(connection.data.endswith(b'\r\n\r\n5\r\nhello\r\n'))
        response.finish()
        self.assertEqual((Answered(connection.data).body, Answered(connection.data).is_complete),
                         (b'hello', True))

    def test_an_abandoned_answer_has_no_end(self):
        response, connection = self.response()
        response.start(200, [])
        response.write(b'hello')
        response.abandon()
        self.assertFalse(Answered(connection.data).is_complete or response.keep_alive)

    def test_head_and_http_1_0_get_what_they_can_read(self):
        response, connection = self.response('HEAD')
        response.send(200, [], b'hello')
        self.assertTrue(connection.data.endswith(b'content-length: 5\r\n\r\n'))
        response, connection = self.response(minor_version=0)
        response.start(200, [])
        response.write(b'hello')
        response.finish()
        self.assertTrue(connection.data.endswith(b'connection: close\r\n\r\nhello'))

    def request(self, *fields, access_token=None, target='/v1/messages'):
        head = make_head('POST', target, fields)
        return cf.ClientRequest(head, b'{}', 'default', access_token)

    def test_a_doubled_v1_is_one(self):
        self.assertEqual(self.request(target='/v1/v1/messages?beta=true').target,
                         '/v1/messages?beta=true')

    def test_only_end_to_end_fields_go_on(self):
        request = self.request(('Host', 'x'), ('Connection', 'keep-alive, X-Hop'), ('X-Hop', '1'),
                               ('Cookie', 'c'), ('X-Api-Key', 'k'), ('Authorization', 'Bearer k'),
                               ('X-Proxy-Key', 'y'), ('Accept-Encoding', 'gzip'),
                               ('User-Agent', 'me'), ('anthropic-version', '2026-10-21'))
        self.assertEqual(request.forwarded_head,
                         'User-Agent: me\r\nanthropic-version: 2026-10-21\r\n')

    def test_the_access_token_is_no_credential_of_the_clients(self):
        fields = (('x-api-key', 'pass'), ('authorization', 'Bearer sk-ant-oat01-x'))
        self.assertEqual(self.request(*fields, access_token='pass').credentials, [fields[1]])
        self.assertEqual(self.request(*fields).credentials, list(fields))
        self.assertIsNone(self.request(('authorization', 'bearer pass'),
                                       access_token='pass').client_key)

    def test_a_clients_credential_cools_under_a_name_that_does_not_tell_it(self):
        one, same, other = (self.request(('x-api-key', value)).client_key
                            for value in ('k1', 'k1', 'k2'))
        self.assertEqual(one.ref, same.ref)
        self.assertNotEqual(one.ref, other.ref)
        self.assertNotIn('k1', repr(tuple(one)))


# ==============================================================================
# Upstream
# ==============================================================================

class RawServer:
    """A server on a port of its own that hands each connection to `play(socket, number)`."""

    def __init__(self, test, play, wrap=lambda sock: sock):
        self.listener = socket.create_server(('127.0.0.1', 0))
        self.port = self.listener.getsockname()[1]
        self.url = f'http://127.0.0.1:{self.port}'
        self.connections = 0
        self.problems = []
        self._play, self._wrap = play, wrap
        self._serving = []            # a thread for each connection
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        test.addCleanup(self._thread.join, PATIENCE_S)
        test.addCleanup(self._close)

    def _close(self):
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def end(self):
        """Takes no further connection, and returns when those that there were have ended."""
        self._close()
        self._thread.join(PATIENCE_S)
        for thread in self._serving:
            thread.join(PATIENCE_S)

    def _accept(self):
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            self._serving.append(threading.Thread(target=self._serve,
                                                  args=(sock, self.connections), daemon=True))
            self._serving[-1].start()

    def _serve(self, sock, number):
        try:
            with self._wrap(sock) as wrapped:
                self._play(wrapped, number)
        except OSError as error:
            self.problems.append(error)


def read_request(sock):
    """(head, body) of the next request; None at the end of the connection."""
    data = b''
    while b'\r\n\r\n' not in data:
        piece = sock.recv(65536)
        if not piece:
            return None
        data += piece
    head, _, body = data.partition(b'\r\n\r\n')
    length = int((re.search(rb'(?i)content-length: (\d+)', head) or [0, 0])[1])
    while len(body) < length:
        body += sock.recv(65536)
    return head, body


def plain_answer(body=b'{}', status='200 OK', fields=''):
    return f'HTTP/1.1 {status}\r\n{fields}content-length: {len(body)}\r\n\r\n'.encode() + body


def tls_files(test):
    """(the path of a certificate and of its key behind it, a server's context), made by
    openssl."""
    if not shutil.which('openssl'):
        test.skipTest('openssl is not installed')
    folder = tempfile.mkdtemp()
    test.addCleanup(shutil.rmtree, folder)
    path = os.path.join(folder, 'cert.pem')
    subprocess.run(['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt',
                    'ec_paramgen_curve:prime256v1', '-nodes',
                    '-keyout', path + '.key', '-out', path, '-days', '2', '-subj', '/CN=localhost',
                    '-addext', 'subjectAltName=DNS:localhost'], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, path + '.key')
    return path, context


class UpstreamTest(SocketTest):
    def setUp(self):
        self.upstream = cf.Upstream()
        self.addCleanup(lambda: self.upstream.close_idle())
        self.exchange = cf.Exchange(None)
        patch = mock.patch.dict(os.environ)
        patch.start()
        self.addCleanup(patch.stop)
        for name in ('HTTPS_PROXY', 'https_proxy', 'ALL_PROXY', 'all_proxy', 'NO_PROXY',
                     'no_proxy', 'SSL_CERT_FILE'):
            os.environ.pop(name, None)

    def wanted(self, url, method='POST', body=b'{}'):
        return cf.UpstreamRequest(cf.parse_base_url(url), method, b'%b / HTTP/1.1\r\nhost: x\r\n'
                                  b'content-length: %d\r\n\r\n' % (method.encode(), len(body)),
                                  body)

    def get(self, url, **options):
        response = self.upstream.open(self.wanted(url, **options), self.exchange, 60)
        try:
            return response.status, response.read_all(1 << 20)
        finally:
            response.close()

    def response(self, data, size=None, method='POST'):
        sock = self.fed(data, size)
        response = cf.UpstreamResponse(sock, self.exchange)
        response.read_head(method)
        return response

    def test_each_openai_token_has_its_target(self):
        config = make_config('a', **with_openai('oa', 'ob', 'oc', openaiApi='responses'))
        document = config.document
        document['openaiKeys']['ob'].update(baseUrl='http://localhost:1/v1',
                                            api='chat_completions')
        config = cf.parse_config(document)
        for ref, token, target in (
                ('anthropic:a', 'sk-ant-x',
                 cf.Target('messages', 'https://api.anthropic.com', 'm')),
                ('openai:oa', 'sk-x',
                 cf.Target('responses', 'https://api.openai.com', 'm', is_openai=True)),
                ('openai:ob', 'sk-x', cf.Target('chat_completions', 'http://localhost:1/v1', 'm')),
                ('openai:ob', make_login(),
                 cf.Target('chat_completions', 'http://localhost:1/v1', 'm')),
                ('openai:oc', make_login(), cf.Target(
                    'responses', 'https://chatgpt.com/backend-api/codex', 'm', is_codex=True))):
            self.assertEqual(cf.find_target(config, config.keys[ref], token, 'm'), target)

    def test_a_base_url_keeps_its_path_and_query(self):
        for base_url, path in (('https://api.openai.com', '/v1/chat/completions'),
                               ('https://api.openai.com/', '/v1/chat/completions'),
                               ('https://api.openai.com/v1', '/v1/chat/completions'),
                               ('https://x/openai/v1/', '/openai/v1/chat/completions'),
                               ('https://x/v1/chat/completions', '/v1/chat/completions'),
                               ('https://x/deployments/d?api-version=1',
                                '/deployments/d/chat/completions?api-version=1')):
            target = cf.Target(cf.CHAT_COMPLETIONS, base_url)
            self.assertEqual(cf.openai_path(target, '/chat/completions'), path)
            self.assertEqual(cf.models_path(target), path.replace('/chat/completions', '/models'))
        self.assertEqual(cf.openai_path(CODEX, '/responses'), '/backend-api/codex/responses')

    def test_openai_gets_its_own_header_fields_alone(self):
        wanted = cf.build_openai_request(CHAT, 'sk-proj-x', {'stream': True, 'text': '\u4e16'},
                                         'session')
        head = dict(line.split(': ', 1) for line in wanted.head.decode().split('\r\n')[1:-2])
        self.assertEqual(head, {'host': 'api.openai.com', 'authorization': 'Bearer sk-proj-x',
                                'content-type': 'application/json',
                                'content-length': str(len(wanted.body)),
                                'accept': 'text/event-stream', 'accept-encoding': 'identity',
                                'user-agent': f'claude-failover/{cf.VERSION}'})
        head = cf.build_openai_request(CODEX, make_login(), {}, 'session').head.decode()
        for line in ('chatgpt-account-id: acc-1', 'openai-beta: responses=experimental',
                     'originator: claude-failover', 'session_id: session'):
            self.assertIn(f'\r\n{line}\r\n', head)

    def test_a_login_says_when_it_is_over_and_what_to_do(self):
        key = cf.Key('openai:l', 'l', cf.OPENAI, make_login(), 'l')
        self.assertEqual(cf.read_usable_token(key, START), key.token)
        for token, words in (
                (make_login(exp=START - 7200),
                 'expired 2 h ago: .*codex login.*add-openai-key file:~/.codex/auth.json'),
                (make_login(**{'https://api.openai.com/auth': {}}), 'names no account'),
                (make_login(**{'https://api.openai.com/auth': {
                    'chatgpt_account_id': 'a\r\nx-evil: 1'}}), 'names no account'),
                ('eyJx.e30.c', 'names no account'), ('eyJx.!.c', 'names no account')):
            with self.assertRaisesRegex(cf.TokenUnavailable, words) as caught:
                cf.read_usable_token(key._replace(token=token), START)
            self.assertNotIn(token, str(caught.exception))
        for odd in (-10 ** 400, float('-inf')):
            with self.assertRaisesRegex(cf.TokenUnavailable, 'expired'):
                cf.read_usable_token(key._replace(token=make_login(exp=odd)), START)
        local = key._replace(base_url='http://localhost:1', token=make_login(exp=1))
        self.assertEqual(cf.read_usable_token(local, START),
                         local.token)   # that server's own business
        os.environ['LOGIN'] = make_login(exp=1)
        with self.assertRaisesRegex(cf.TokenUnavailable, 'codex login') as caught:
            cf.read_usable_token(key._replace(token='env:LOGIN'), START)
        self.assertNotIn('auth.json', str(caught.exception))

    def test_waiting_for_more_of_a_body_does_not_read_it(self):
        near, far = socket.socketpair()
        self.addCleanup(near.close)
        with far:
            far.sendall(b'HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n')
            response = cf.UpstreamResponse(near, self.exchange)
            response.read_head('POST')
            self.assertFalse(response.wait(0))
            far.sendall(b'a')
            self.assertTrue(response.wait(PATIENCE_S))
            self.assertEqual(response.read(), b'a')
            far.sendall(b'b')
            self.assertEqual((response.read(), response.wait(0)), (b'b', True))

    def test_half_a_line_between_chunks_does_not_end_the_wait_for_more(self):
        near, far = socket.socketpair()
        self.addCleanup(near.close)
        with far:
            far.sendall(b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r')
            response = cf.UpstreamResponse(near, self.exchange)
            response.read_head('POST')
            self.assertEqual((response.read(), response.wait(0)), (b'a', False))
            far.sendall(b'\n\r\n')
            self.assertEqual((response.wait(PATIENCE_S), response.read(), response.ended),
                             (True, b'', True))

    def test_answers_may_arrive_in_any_pieces(self):
        for data, body in ((plain_answer(b'hello'), b'hello'),
                           (b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nhel\r\n'
                            b'2;x=y\r\nlo\r\n0\r\nT: x\r\n\r\n', b'hello'),
                           (b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nTransfer-Encoding: '
                            b'Chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n', b'hello'),
                           (b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked,chunked\r\n\r\n5\r\n'
                            b'hello\r\n0\r\n\r\n', b'hello'),
                           (b'HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n'
                            b'Link: x\r\n\r\n' + plain_answer(b'hello'), b'hello'),
                           (b'HTTP/1.0 200\r\n\r\nhello', b'hello'),
                           (plain_answer(b'', '204 No Content'), b'')):
            for size in (*range(1, 30), len(data)):
                with self.subTest(data=data[:60], size=size):
                    response = self.response(data, size)
                    self.assertEqual(response.read_all(100), body)
                    self.assertTrue(response.ended)

    def test_the_body_of_an_answer_that_is_waited_for_may_be_silent_as_long_as_its_head(self):
        server = RawServer(self, lambda sock, number: read_request(sock)
                           and sock.sendall(plain_answer(b'hello')))
        clock = FakeClock()
        exchange = cf.Exchange(None, clock)
        for wait, silent_s in ((lambda response: None, 1200), (None, cf.STREAM_IDLE_S)):
            response = self.upstream.open(self.wanted(server.url), exchange, 1200, wait)
            self.assertEqual(exchange.deadline, clock.now + silent_s)
            response.limit_silence(7)
            self.assertEqual((exchange.deadline, response.read_all(9)), (clock.now + 7, b'hello'))
            response.close()

    def test_a_head_has_one_deadline_and_a_body_a_new_one_with_each_piece(self):
        clock, deadlines = FakeClock(), []
        exchange = cf.Exchange(None, clock)
        sent = iter(pieces(b'HTTP/1.1 103 Early Hints\r\n\r\n' + plain_answer(b'hello'), 1))

        def receive(size):
            deadlines.append(exchange.deadline)
            clock.now += 1
            return next(sent)
        exchange.attach(None, 60)
        begun = clock.now
        response = cf.UpstreamResponse(mock.Mock(spec=['recv'], recv=receive), exchange)
        response.read_head('POST')
        self.assertEqual(set(deadlines), {begun + 60})
        deadlines.clear()
        in_body = clock.now
        self.assertEqual(response.read_all(5), b'hello')
        self.assertEqual(deadlines, [in_body + cf.STREAM_IDLE_S + second for second in range(5)])

    def test_an_answer_to_head_has_no_body(self):
        response = self.response(b'HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n', method='HEAD')
        self.assertEqual((response.length, response.read()), (5, b''))

    def test_a_body_that_ends_too_early_is_a_cut(self):
        for data in (b'HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhello',
                     b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n',
                     b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\nhello',
                     b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n',
                     b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhello\r\n'
                     b'0\r\n\r\n',
                     b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n'
                     + b'T: x\r\n' * 101,
                     b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n'):
            with self.subTest(data=data[:80]), self.assertRaises(cf.UpstreamCut):
                self.response(data).read_all(100)

    def test_a_reset_is_no_end_of_a_body_that_has_no_other(self):
        response = self.response(b'HTTP/1.0 200 OK\r\n\r\nhello')
        response._sock = mock.Mock(recv=mock.Mock(side_effect=ConnectionResetError(104, 'reset')))
        response._buffer = b''
        with self.assertRaises(cf.UpstreamCut):
            response.read_all(100)

    def test_what_is_no_answer_is_a_cut(self):
        for data in (b'nonsense\r\n\r\n', b'HTTP/1.1 2000 OK\r\n\r\n',
                     b'HTTP/1.1 101 Switching\r\n\r\n', b'',
                     b'HTTP/1.1 200 OK\r\ncontent-length: 5, 5\r\n\r\nhello',
                     *(b'HTTP/1.1 200 OK\r\ntransfer-encoding: %b\r\n\r\n' % coding
                       for coding in (b'gzip', b'gzip, chunked', b'chunked, gzip', b'',
                                      b'chunked;x=y', b'chunked\r\ntransfer-encoding: identity')),
                     b'HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\nhello',
                     b'HTTP/1.1 200 OK\r\ncontent-length: 1\r\n 0\r\n\r\nhello', b'HTTP/1.1 200 '
                     b'OK\r\nTransfer-Encoding : chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n',
                     b'HTTP/1.1 103 Early Hints\r\n\r\n' * 21 + plain_answer(),
                     b'HTTP/1.1 101 Switching\r\n\r\n' + plain_answer(),
                     b'HTTP/1.1 200 OK\r\n' + b'a: b\r\n' * 101 + b'\r\n',
                     b'HTTP/1.1 200 OK\r\na: ' + b'b' * 70_000):
            with self.subTest(data=data[:60]), self.assertRaises(cf.UpstreamCut) as caught:
                self.response(data)
            self.assertNotRegex(str(caught.exception),
                                'nonsense|OK|gzip|Switching')   # its words may hold anything

    def test_a_chunked_body_has_no_endless_line_and_no_endless_trailers(self):
        head = b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n'
        for data in (b'5;' + b'x' * cf.MAX_LINE_BYTES * 2 + b'\r\nhello\r\n0\r\n\r\n',
                     b'0\r\n' + b'T: x\r\n' * (cf.MAX_FIELDS + 1) + b'\r\n'):
            sock = mock.Mock(spec=['recv'], recv=mock.Mock(side_effect=pieces(head + data, 500)))
            response = cf.UpstreamResponse(sock, self.exchange)
            response.read_head('POST')
            with self.subTest(data=data[:9]), self.assertRaises(cf.UpstreamCut):
                response.read_all(100)

    def test_an_endless_error_body_is_not_read_to_its_end(self):
        response = self.response(b'HTTP/1.0 500 Oops\r\n\r\n')
        response._sock = mock.Mock(recv=lambda size: b'x' * size)
        self.assertLess(len(response.read_all(1_000_000)), 1_100_000)

    def test_folded_and_malformed_fields_are_dropped(self):
        response = self.response(b'HTTP/1.1 200 OK\r\na: 1\r\n b: 2\r\nc : 3\r\nd: 4\r\n'
                                 b'content-length: 0\r\n\r\n')
        self.assertEqual(response.fields, [('a', '1'), ('d', '4')])

    def test_a_connection_is_reused(self):
        def play(sock, number):
            while read_request(sock):
                sock.sendall(plain_answer(b'%d' % number))
        server = RawServer(self, play)
        self.assertEqual([self.get(server.url)[1] for _ in range(3)], [b'1'] * 3)

    def test_a_connection_that_closed_while_idle_is_replaced_silently(self):
        done = threading.Event()

        def play(sock, number):
            read_request(sock)
            sock.sendall(plain_answer(b'%d' % number))
            if number == 1:
                sock.shutdown(socket.SHUT_RDWR)
                done.set()
            else:
                read_request(sock)
        server = RawServer(self, play)
        self.assertEqual(self.get(server.url)[1], b'1')
        self.assertTrue(done.wait(PATIENCE_S))
        self.assertEqual(self.get(server.url)[1], b'2')

    def test_a_reused_connection_that_dies_before_an_answer_is_replaced_once(self):
        def play(sock, number):
            read_request(sock)
            sock.sendall(plain_answer(b'%d' % number))
            read_request(sock)        # and it closes without an answer
        server = RawServer(self, play)
        self.assertEqual([self.get(server.url)[1] for _ in range(2)], [b'1', b'2'])

    def test_a_request_is_sent_at_most_twice_however_many_idle_connections_have_died(self):
        requests, opened, together = queue.Queue(), [], threading.Barrier(4)

        def play(sock, number):
            read_request(sock)
            together.wait(PATIENCE_S)
            sock.sendall(plain_answer())
            read_request(sock)
            requests.put(number)      # and it closes without an answer

        def last(sock, number):
            server._play = play
            play(sock, number)
        server = RawServer(self, last)
        threads = [threading.Thread(target=lambda: opened.append(self.get(server.url)))
                   for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        self.assertEqual(len(opened), 4)
        server._play = lambda sock, number: requests.put(read_request(sock) and number)
        with self.assertRaises(cf.UpstreamUnreachable):
            self.get(server.url)
        self.assertEqual(requests.qsize(), 2)

    def test_a_reused_connection_that_dies_within_an_answer_is_an_error(self):
        def play(sock, number):
            read_request(sock)
            sock.sendall(plain_answer(b'%d' % number))
            read_request(sock)        # it may have been paid for
            sock.sendall(b'HTTP/1.1 200 O')
        server = RawServer(self, play)
        self.assertEqual(self.get(server.url)[1], b'1')
        with self.assertRaises(cf.UpstreamUnreachable):
            self.get(server.url)
        self.assertEqual(server.connections, 1)

    def test_a_silent_connection_is_kept_alive_as_each_system_does_it(self):
        with socket.socket() as sock:
            cf.keep_alive(sock)
            self.assertTrue(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
            if sys.platform == 'linux':
                self.assertEqual([sock.getsockopt(socket.IPPROTO_TCP, option) for option in (
                    socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)], [60, 60, 5])
        sock = mock.Mock()
        with mock.patch('os.name', 'nt'), mock.patch('socket.SIO_KEEPALIVE_VALS', 7, create=True):
            cf.keep_alive(sock)
        sock.ioctl.assert_called_once_with(7, (1, 60_000, 60_000))
        with mock.patch.object(sys, 'platform', 'darwin'), \
                mock.patch.object(cf, 'socket', mock.Mock(
                    spec=['SOL_SOCKET', 'SO_KEEPALIVE', 'IPPROTO_TCP'], IPPROTO_TCP=6)):
            cf.keep_alive(sock)
        sock.setsockopt.assert_called_with(6, 0x10, 60)

    def test_every_connection_is_kept_alive_and_sends_at_once(self):
        server = self.answering()
        self.get(server.url)
        (sock, _), = self.upstream._idle['http', '127.0.0.1', server.port]
        self.assertTrue(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        if hasattr(socket, 'TCP_KEEPIDLE'):
            self.assertEqual(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), 60)

    def black_hole(self):
        """The port of a server that takes no connection and refuses none."""
        listener = socket.socket()
        self.addCleanup(listener.close)
        listener.bind(('127.0.0.1', 0))
        listener.listen(0)
        for _ in range(3):            # its queue is full then
            sock = socket.socket()
            self.addCleanup(sock.close)
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        return listener.getsockname()[1]

    def resolve(self, *ports):
        """Every host has these ports of this machine as addresses; lists those dialed."""
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, '', ('127.0.0.1', port))
                 for port in ports]
        dialed, begin = [], cf.begin_connection
        for patch in (mock.patch('socket.getaddrinfo', return_value=found), mock.patch.object(
                cf, 'begin_connection', lambda selector, address, errors: dialed.append(
                    address[4][1]) or begin(selector, address, errors))):
            patch.start()
            self.addCleanup(patch.stop)
        return dialed

    def answering(self):
        def play(sock, number):
            while read_request(sock):
                sock.sendall(plain_answer(b'%d' % number))
        return RawServer(self, play)

    @unittest.skipIf(os.name == 'nt', 'a full queue refuses there')
    def test_a_silent_address_costs_a_moment_and_only_once(self):
        server, hole = self.answering(), self.black_hole()
        dialed = self.resolve(hole, server.port)
        with mock.patch.object(cf, 'NEXT_ADDRESS_S', 0.01):
            self.assertEqual(self.get('http://two.example')[1], b'1')
        self.assertEqual(dialed, [hole, server.port])
        self.upstream.close_idle()
        with mock.patch.object(cf, 'NEXT_ADDRESS_S', PATIENCE_S * 9):
            self.assertEqual(self.get('http://two.example')[1], b'2')
        self.assertEqual(dialed, [hole, server.port, server.port])

    def test_an_address_that_refuses_costs_nothing_and_the_others_are_closed(self):
        with socket.create_server(('127.0.0.1', 0)) as closed:
            gone = closed.getsockname()[1]
        server, hole = self.answering(), self.black_hole()
        dialed, sockets = self.resolve(hole, gone, server.port), []
        register = selectors.DefaultSelector.register
        with mock.patch.object(cf, 'NEXT_ADDRESS_S', 0.01), \
                mock.patch.object(selectors.DefaultSelector, 'register',
                                  lambda selector, sock, *rest: sockets.append(sock)
                                  or register(selector, sock, *rest)):
            self.assertEqual(self.get('http://three.example')[1], b'1')
        self.assertEqual(dialed, [hole, gone, server.port])
        self.assertEqual([sock.fileno() > 0 for sock in sockets], [False, False, True])

    def test_families_take_turns_and_what_worked_comes_first(self):
        six = [(socket.AF_INET6, socket.SOCK_STREAM, 6, '', (f'fd00::{n}', 443, 0, 0))
               for n in range(3)]
        four = [(socket.AF_INET, socket.SOCK_STREAM, 6, '', (f'10.0.0.{n}', 443))
                for n in range(2)]
        for last, order in ((cf.Dialed(), [six[0], four[0], six[1], four[1], six[2]]),
                            (cf.Dialed(four[1], True), [four[1], six[0], four[0], six[1], six[2]]),
                            (cf.Dialed(six[0], False), [four[0], six[1], four[1], six[2], six[0]]),
                            (cf.Dialed(('elsewhere',), True),
                             [six[0], four[0], six[1], four[1], six[2]])):
            self.assertEqual(cf.in_turn([*six, *four], last), order)
        self.assertEqual(cf.in_turn(four, cf.Dialed()), four)

    def test_a_family_that_the_system_lacks_is_passed_over(self):
        server = self.answering()
        self.resolve(1, server.port)
        found = [(socket.AF_INET6, socket.SOCK_STREAM, 6, '', ('2001:db8::1', 1, 0, 0)),
                 *socket.getaddrinfo('x', 1)[1:]]
        real = socket.socket

        def four_only(family=socket.AF_INET, *rest, **options):
            if family == socket.AF_INET6:
                raise OSError(97, 'Address family not supported by protocol')
            return real(family, *rest, **options)
        with mock.patch('socket.getaddrinfo', return_value=found), \
                mock.patch('socket.socket', four_only):
            self.assertEqual(self.get('http://two.example')[1], b'1')
            self.upstream.close_idle()
            server.end()
            with self.assertRaisesRegex(cf.UpstreamUnreachable, 'refused'):     # that tells more
                self.get('http://two.example')

    @unittest.skipIf(os.name == 'nt', 'a full queue refuses there')
    def test_a_connection_that_is_not_made_in_time_is_given_up(self):
        self.resolve(self.black_hole())
        with mock.patch.object(cf, 'CONNECT_S', 0.05), \
                self.assertRaisesRegex(cf.UpstreamUnreachable, 'timed out') as caught:
            self.get('http://one.example')
        self.assertFalse(caught.exception.connected)

    def test_a_black_hole_gets_less_time_but_now_and_then_all_of_it(self):
        given_s, outcomes = [], iter([socket.timeout()] * 5
                                     + [ConnectionRefusedError(111, 'refused'), socket.timeout()])

        def dial(addresses, deadline):
            given_s.append(round(deadline - time.monotonic()))
            raise next(outcomes)
        with mock.patch.object(cf, 'dial', dial), \
                mock.patch.object(cf, 'resolve', return_value=[]):
            for _ in range(7):
                self.assertRaises(cf.UpstreamUnreachable, self.get, 'http://one.example')
        self.assertEqual(given_s, [10, 4, 4, 4, 10, 4, 10])

    def test_an_address_that_fails_behind_tcp_is_the_last_next_time(self):
        server = RawServer(self, lambda sock, number: None)      # it speaks no TLS
        dialed = self.resolve(server.port, server.port + 1)
        self.assertRaises(cf.UpstreamUnreachable, self.get, 'https://two.example')
        self.assertRaises(cf.UpstreamUnreachable, self.get, 'https://two.example')
        self.assertEqual(dialed, [server.port, server.port + 1, server.port])

    def test_a_fresh_connection_that_dies_is_an_error(self):
        server = RawServer(self, lambda sock, number: read_request(sock))
        with self.assertRaises(cf.UpstreamUnreachable) as caught:
            self.get(server.url)
        self.assertTrue(caught.exception.connected)
        self.assertEqual(server.connections, 1)

    def test_unasked_bytes_and_old_connections_are_thrown_away(self):
        sent = threading.Event()

        def play(sock, number):
            read_request(sock)
            sock.sendall(plain_answer(b'%d' % number))
            if number == 1:
                sock.sendall(plain_answer(b'stale'))
                sent.set()
            read_request(sock)
        server = RawServer(self, play)
        self.assertEqual(self.get(server.url)[1], b'1')
        self.assertTrue(sent.wait(PATIENCE_S))
        self.assertEqual(self.get(server.url)[1], b'2')
        self.upstream._now = lambda: time.time() + cf.POOL_IDLE_S + 1
        self.assertEqual(self.get(server.url)[1], b'3')

    def test_an_idle_connection_is_reused_only_while_it_is_young_and_silent(self):
        base = ('http', 'h', 1)
        for seconds, does, is_good in (
                (0, lambda peer: None, True), (cf.POOL_IDLE_S, lambda peer: None, True),
                (cf.POOL_IDLE_S + 1, lambda peer: None, False), (-1, lambda peer: None, False),
                (0, lambda peer: peer.sendall(b'x'), False), (0, socket.socket.close, False)):
            now = [1000]
            self.upstream._now = lambda: now[0]
            sock, peer = socket.socketpair()
            self.addCleanup(sock.close)
            self.addCleanup(peer.close)
            self.upstream._put_back(base, sock)
            now[0] += seconds
            does(peer)
            with self.subTest(seconds=seconds, is_good=is_good):
                self.assertEqual((self.upstream._take_idle(base), sock.fileno() > 0),
                                 (sock if is_good else None, is_good))

    def test_a_connection_with_bytes_behind_its_answer_is_not_used_again(self):
        for behind, kept in ((b'', 1), (b'HTTP/1.1 408 Request Timeout\r\n\r\n', 0)):
            response, again = self.response(plain_answer(b'hello') + behind), []
            response.when_closed = again.append
            self.assertEqual(response.read_all(100), b'hello')
            response.close()
            with self.subTest(behind=behind):
                self.assertEqual((len(again), response._sock.fileno() > 0), (kept, bool(kept)))

    def test_old_idle_connections_are_closed(self):
        now = [0]
        self.upstream._now = lambda: now[0]
        base, (old, old_end), (new, new_end) = (('http', 'h', 1), socket.socketpair(),
                                                socket.socketpair())
        for sock in (new, old_end, new_end):
            self.addCleanup(sock.close)
        self.upstream._put_back(base, old)
        now[0] += cf.POOL_IDLE_S
        self.upstream._put_back(base, new)
        self.upstream.close_idle(cf.POOL_IDLE_S)
        self.assertEqual((old.fileno(), new.fileno() > 0), (-1, True))

    def test_an_unread_answer_costs_its_connection(self):
        def play(sock, number):
            while read_request(sock):
                sock.sendall(plain_answer(b'x' * 100_000))
        server = RawServer(self, play)
        response = self.upstream.open(self.wanted(server.url), self.exchange, 60)
        response.read()
        response.close()
        self.get(server.url)
        self.assertEqual(server.connections, 2)

    def test_an_answer_to_a_body_that_was_not_read_is_read(self):
        done = threading.Event()
        self.addCleanup(done.set)

        def play(sock, number):
            sock.recv(1000)
            sock.sendall(plain_answer(b'too large', '413 Too Large'))
            done.wait(PATIENCE_S)     # without reading another byte of it
        server = RawServer(self, play)
        for _ in range(2):            # and its connection is not used again
            self.assertEqual(self.get(server.url, body=b'x' * 30_000_000), (413, b'too large'))
        self.assertEqual(server.connections, 2)

    def test_trouble_names_the_host_and_the_reason(self):
        with socket.create_server(('127.0.0.1', 0)) as closed:
            url = f'http://127.0.0.1:{closed.getsockname()[1]}'
        with self.assertRaisesRegex(cf.UpstreamUnreachable,
                                    '127.0.0.1: Connection refused') as caught:
            self.get(url)
        self.assertFalse(caught.exception.connected)
        with mock.patch('socket.getaddrinfo', side_effect=socket.gaierror(-2, 'unknown')):
            with self.assertRaisesRegex(cf.UpstreamUnreachable,
                                        'nowhere.example: name resolution failed'):
                self.get('http://nowhere.example')

    def test_a_client_that_left_ends_a_wait_for_an_answer(self):
        asked = threading.Event()

        def play(sock, number):
            read_request(sock)
            asked.set()
            sock.recv(1)
        server = RawServer(self, play)

        def leave():
            asked.wait(PATIENCE_S)
            self.exchange.client_left()
        threading.Thread(target=leave, daemon=True).start()
        with self.assertRaises(cf.ClientGone):
            self.get(server.url)

    def tls_server(self, before_answer=lambda: None):
        path, context = tls_files(self)

        def play(sock, number):
            sock.settimeout(PATIENCE_S)
            while read_request(sock):
                before_answer()
                sock.sendall(plain_answer(b'%d' % number))
        server = RawServer(self, play, lambda sock: context.wrap_socket(sock, server_side=True))
        return server, f'https://localhost:{server.port}', path

    def test_tls_is_verified_and_reused(self):
        server, url, path = self.tls_server()
        with self.assertRaisesRegex(cf.UpstreamUnreachable,
                                    'certificate not accepted.*SSL_CERT_FILE'):
            self.get(url)
        os.environ['SSL_CERT_FILE'] = path
        self.upstream = cf.Upstream()      # it reads the setting when it first needs TLS
        self.assertEqual([self.get(url) for _ in range(3)], [(200, b'2')] * 3)
        with self.assertRaisesRegex(cf.UpstreamUnreachable, 'certificate not accepted'):
            self.get(url.replace('localhost', '127.0.0.1'))      # the name is verified too

    def test_what_tls_sends_by_itself_does_not_end_a_large_body(self):
        send_request = cf.send_request

        def send_late(sock, *rest):
            self.assertTrue(cf.readable([sock], PATIENCE_S))      # the server's session tickets
            return send_request(sock, *rest)
        _, url, os.environ['SSL_CERT_FILE'] = self.tls_server()
        with mock.patch.object(cf, 'send_request', send_late):
            self.assertEqual(self.get(url, body=b'x' * 3 * cf.SEND_BYTES), (200, b'1'))
        self.assertEqual(self.get(url, body=b'x' * 3 * cf.SEND_BYTES),
                         (200, b'1'))   # over the same connection

    def test_what_tls_sends_by_itself_is_no_answer(self):
        asked, go = threading.Event(), threading.Event()

        def before_answer():
            asked.set()
            go.wait(PATIENCE_S)

        def wait(response):
            # By now the server has sent its session tickets.
            self.assertTrue(asked.wait(PATIENCE_S))
            self.assertFalse(response.wait(0.01))
            go.set()
            self.assertTrue(response.wait(PATIENCE_S))
        _, url, os.environ['SSL_CERT_FILE'] = self.tls_server(before_answer)
        response = self.upstream.open(self.wanted(url), self.exchange, 60, wait)
        self.assertEqual(response.read_all(100), b'1')
        response.close()
        self.assertEqual(self.get(url), (200, b'1'))      # over the same connection

    def test_a_proxy_is_used_for_far_https_hosts_by_connect(self):
        seen = queue.Queue()

        def play(sock, number):
            seen.put(read_request(sock)[0])
            sock.sendall(b'HTTP/1.1 407 Proxy Authentication Required\r\n\r\n')
        proxy = RawServer(self, play)
        os.environ['HTTPS_PROXY'] = f'http://user:p%40ss@127.0.0.1:{proxy.port}'
        with self.assertRaisesRegex(cf.UpstreamUnreachable,
                                    'api.example.com by way of the proxy 127.0.0.1'):
            self.get('https://api.example.com')
        head = seen.get(timeout=PATIENCE_S).decode()
        self.assertTrue(head.startswith('CONNECT api.example.com:443 '))
        self.assertIn('Proxy-Authorization: Basic dXNlcjpwQHNz', head)
        os.environ['NO_PROXY'] = 'example.com'
        self.assertIsNone(cf.outbound_proxy(cf.parse_base_url('https://api.example.com')))
        for url in ('https://localhost:1', 'https://LOCALHOST.', 'https://a.localhost',
                    'https://127.0.0.1', 'https://127.1', 'https://[::1]',
                    'https://[::ffff:127.0.0.1]', 'https://0.0.0.0', 'http://gpu-box:8000'):
            self.assertIsNone(cf.outbound_proxy(cf.parse_base_url(url)))

    def find_proxy(self, url='https://other.org', **environ):
        with mock.patch.dict(os.environ, environ):
            proxy = cf.outbound_proxy(cf.parse_base_url(url))
        return proxy and (proxy.open_tunnel.__name__.split('_')[1], *proxy[:4])

    def test_each_variable_and_scheme_of_a_proxy(self):
        socks = ('socks', 'box', 1080, None, '')
        for environ, found in (({'ALL_PROXY': 'http://box'}, ('http', 'box', 80, None, '')),
                               ({'all_proxy': 'box:3128'}, ('http', 'box', 3128, None, '')),
                               ({'HTTPS_PROXY': 'socks5://box'}, socks),
                               ({'https_proxy': 'SOCKS5H://box/'}, socks),
                               ({'all_proxy': ' socks5h://box '}, socks),
                               ({'ALL_PROXY': 'socks5://u%40:p%3a@[::1]:9'},
                                ('socks', '::1', 9, 'u@', 'p:')),
                               ({'ALL_PROXY': 'socks5://u@box'}, ('socks', 'box', 1080, 'u', '')),
                               ({'HTTPS_PROXY': 'http://first:1', 'ALL_PROXY': 'socks5://box'},
                                ('http', 'first', 1, None, '')),
                               ({'HTTPS_PROXY': '', 'ALL_PROXY': 'socks5://box'}, socks),
                               ({'ALL_PROXY': ''}, None), ({'HTTP_PROXY': 'http://box'}, None)):
            with self.subTest(environ=environ):
                self.assertEqual(self.find_proxy(**environ), found)
        for no_proxy, is_used in (('*', False), ('other.org', False), ('.other.org', False),
                                  (' x, other.org:443 ', False), ('ther.org', True),
                                  ('other.org:1', True)):
            with self.subTest(no_proxy=no_proxy):
                self.assertEqual(
                    bool(self.find_proxy(ALL_PROXY='socks5://box', no_proxy=no_proxy)), is_used)
        for variable in ('HTTPS_PROXY', 'ALL_PROXY'):
            for wrong in ('socks4://u:secret@box:1', 'socks4a://box', 'socks://box', 'https://box',
                          'http://proxy:80x', 'http://[::1', 'http://', 'socks5://'):
                with self.subTest(wrong=wrong), self.assertRaisesRegex(
                        cf.UpstreamUnreachable, f'^{variable} must be a URL like http://host:port '
                        'or socks5://host:port') as caught:
                    self.find_proxy(**{variable: wrong})
                self.assertNotIn('secret', caught.exception.reason)

    def socks_server(self, log, method=b'\x05\x00', login=b'\x01\x00',
                     reply=b'\x05\x00\x00\x01' + bytes(6)):
        """A SOCKS5 proxy that is itself the TLS server asked for; `log` gets what came."""
        path, context = tls_files(self)
        os.environ['SSL_CERT_FILE'] = path

        def play(sock, number):
            for answer in (method, *((login,) if method[1:] == b'\x02' else ()), reply):
                log.append(sock.recv(65536))
                for piece in pieces(answer, 1):
                    sock.sendall(piece)
            with context.wrap_socket(sock, server_side=True) as inside:
                while read_request(inside):
                    inside.sendall(plain_answer(b'by socks'))
        return RawServer(self, play)

    def test_a_socks5_proxy_looks_names_up_and_tls_is_verified_behind_it(self):
        asked = b'\x05\x01\x00\x03\x09localhost\x01\xbb'
        for scheme, login, options, seen in (
                ('socks5', '', {}, [b'\x05\x01\x00', asked]),
                ('socks5h', '', {'reply': b'\x05\x00\x00\x03\x02ab\x00\x01'},
                 [b'\x05\x01\x00', asked]),
                ('socks5', 'us:p%20w@', {}, [b'\x05\x02\x00\x02', asked]),
                ('socks5', 'us:p%20w@',
                 {'method': b'\x05\x02', 'reply': b'\x05\x00\x00\x04' + bytes(18)},
                 [b'\x05\x02\x00\x02', b'\x01\x02us\x03p w', asked])):
            with self.subTest(scheme=scheme, login=login), \
                    mock.patch.object(cf, 'is_loopback', return_value=False):
                log = []
                server = self.socks_server(log, **options)
                os.environ['ALL_PROXY'] = f'{scheme}://{login}127.0.0.1:{server.port}'
                self.upstream = cf.Upstream()
                self.assertEqual([self.get('https://localhost') for _ in range(2)],
                                 [(200, b'by socks')] * 2)
                self.assertEqual((log, server.connections), (seen, 1))
                self.upstream.close_idle()

    def test_a_socks5_proxy_is_asked_for_addresses_as_such(self):
        for host, sent in (('10.1.2.3', b'\x01\x0a\x01\x02\x03'),
                           ('2001:db8::1', b'\x04' + bytes.fromhex('20010db8' + '0' * 23 + '1')),
                           ('a.example', b'\x03\x09a.example')):
            self.assertEqual(cf.socks_address(host), sent)
        self.assertRaises(OSError, cf.socks_address, '.'.join(['a' * 60] * 5))

    def test_a_socks5_proxy_says_why_it_does_not_connect(self):
        for scheme, answers, words in (
                ('socks5://', (b'HTTP/1.1 400 Bad Request\r\n\r\n',), 'it is no SOCKS5 proxy'),
                ('socks5://', (b'\x05\xff',), 'asks for a user name and password'),
                ('socks5://u:secret@', (b'\x05\xff',), 'asks for a user name'),
                ('socks5://u:secret@', (b'\x05\x02', b'\x01\x01'),
                 'does not accept this user name'),
                ('socks5://', (b'\x05\x00', b'\x05\x05\x00\x01' + bytes(6)), 'connection refused'),
                ('socks5://', (b'\x05\x00', b'\x05\x63\x00\x01'), 'it is no SOCKS5'),
                ('socks5://', (b'\x05\x00', b''), 'closed the connection|reset')):
            with self.subTest(words=words):
                reason = self.proxied(*answers, scheme=scheme, ends=True)
                self.assertRegex(reason, f'^api.example.com by way of the proxy 127.0.0.1:[0-9]+: '
                                 f'.*{words}')
                self.assertNotIn('secret', reason)

    def proxied(self, *answers, scheme='http://', ends=False):
        """Why a request fails by way of a proxy that sends these bytes, one after each receive."""
        def play(sock, number):
            for answer in answers:
                sock.recv(65536)
                sock.sendall(answer)
            if not ends:
                sock.recv(1)
        proxy = RawServer(self, play)
        os.environ['HTTPS_PROXY'] = f'{scheme}127.0.0.1:{proxy.port}'
        with self.assertRaises(cf.UpstreamUnreachable) as caught:
            self.get('https://api.example.com')
        self.assertFalse(caught.exception.connected)
        return caught.exception.reason

    def test_tls_is_verified_behind_an_http_proxy(self):
        os.environ['SSL_CERT_FILE'], context = tls_files(self)

        def play(sock, number):
            read_request(sock)
            sock.sendall(b'HTTP/1.0 200 Connection established\r\nvia: x\r\n\r\n')
            with context.wrap_socket(sock, server_side=True) as inside:
                while read_request(inside):
                    inside.sendall(plain_answer(b'by connect'))
        proxy = RawServer(self, play)
        os.environ['all_proxy'] = f'127.0.0.1:{proxy.port}'
        with mock.patch.object(cf, 'is_loopback', return_value=False):
            self.assertEqual([self.get('https://localhost') for _ in range(2)],
                             [(200, b'by connect')] * 2)
        with self.assertRaisesRegex(cf.UpstreamUnreachable, 'other.example by way of the proxy '
                                    '.*: certificate not accepted'):
            self.get('https://other.example')

    def test_a_proxy_says_why_it_does_not_connect(self):
        for answer, words in ((b'HTTP/1.1 407 Proxy sk-ant-secret\r\na: b\r\n\r\n',
                               'it answered 407'), (b'HTTP/1.0 502\r\n\r\n', 'it answered 502'),
                              (b'SSH-2.0\r\n\r\n', 'it is no HTTP proxy'),
                              (b'HTTP/1.1 200 OK\r\n' + b'x' * 20_000, 'its answer is too long')):
            with self.subTest(words=words):
                self.assertRegex(self.proxied(answer), f'^api.example.com by way of the proxy '
                                 f'127.0.0.1:[0-9]+: {words}$')

    def test_a_proxy_that_drips_has_no_longer_than_others(self):
        clock = [100.0]

        def receive(size):
            clock[0] += 3
            return b'x' * size
        sock = mock.Mock(recv=receive)
        with mock.patch('time.monotonic', lambda: clock[0]), self.assertRaises(socket.timeout):
            cf.open_http_tunnel(sock, cf.Proxy('h', 1, None, '', None),
                                cf.parse_base_url('https://x.example'), 110)
        self.assertEqual(clock[0], 112)

    def test_base_urls_keep_their_path_less_a_closing_v1(self):
        for url, host_field, path in (('https://api.anthropic.com', 'api.anthropic.com', ''),
                                      ('http://[::1]:8000/', '[::1]:8000', ''),
                                      ('https://x.example/anthropic/', 'x.example', '/anthropic'),
                                      ('http://h:1/a/v1', 'h:1', '/a')):
            base = cf.parse_base_url(url)
            self.assertEqual((base.host_field, base.path), (host_field, path))

    def test_tokens_are_read_where_they_are_kept(self):
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        os.environ['SOME_KEY'] = ' secret '
        for content, token in ((' secret \n', 'secret'),
                               ('{"claudeAiOauth": {"accessToken": "t1"}}', 't1'),
                               ('{"tokens": {"access_token": "t2"}, "OPENAI_API_KEY": null}',
                                't2'), ('{"OPENAI_API_KEY": "t3"}', 't3')):
            path = os.path.join(folder, 'token')
            with open(path, 'w') as file:
                file.write(content)
            self.assertEqual(cf.read_token(f'file:{path}'), token)
        self.assertEqual((cf.read_token('env:SOME_KEY'), cf.read_token('sk-x')),
                         ('secret', 'sk-x'))
        for content, words in (('two words', 'does not hold a token alone'),
                               ('{"a": 1}', 'no access token'), ('{', 'not valid JSON')):
            with open(path, 'w') as file:
                file.write(content)
            with self.subTest(content=content), self.assertRaisesRegex(cf.TokenUnavailable, words):
                cf.read_token(f'file:{path}')
        with self.assertRaisesRegex(cf.TokenUnavailable, 'NOT_THERE is not set'):
            cf.read_token('env:NOT_THERE')
        with self.assertRaisesRegex(cf.TokenUnavailable, 'cannot be read'):
            cf.read_token(f'file:{folder}/none')


# ==============================================================================
# Serving
# ==============================================================================

RATE_LIMITED = refusal(429, 'rate_limit_error', 'slow down', retry_after='20')
SERVER_TROUBLE = refusal(500, 'api_error', 'Internal server error')
OVERLOADED = refusal(529, 'overloaded_error', 'Overloaded')
BAD_KEY = refusal(401, 'authentication_error', 'invalid x-api-key')
FORBIDDEN = refusal(403, 'permission_error', 'not for you')
NO_CREDIT = refusal(400, 'invalid_request_error',
                    'Your credit balance is too low to access the Anthropic API.')
NOT_HERE = refusal(404, 'not_found_error', 'File not found: x')
NO_MODEL = refusal(404, 'not_found_error', f'model: {OPUS}')
LONG = refusal(429, 'rate_limit_error', 'slow down', retry_after='3000')
CUT_BODY = Play()
CUT_BODY.pieces = [cf.UpstreamCut('cut before its first byte')]
REFUSED = cf.UpstreamUnreachable('host: Connection refused', False)
RESET = cf.UpstreamUnreachable('host: it closed the connection', True)


class ServingTest(unittest.TestCase):
    def setUp(self):
        self.clock = FakeClock()
        self.cooldowns = cf.Cooldowns(self.clock, self.clock.unix_s)
        self.log = mock.Mock()
        self.metrics = cf.Metrics(self.clock.unix_s)

    def failover(self, upstream, config):
        self.store = mock.Mock(current=config)
        self.upstream, upstream.clock = upstream, self.clock
        self.failover_ = cf.Failover(self.store, self.cooldowns, upstream,
                                     cf.Journal(self.log, self.metrics),
                                     clock=self.clock, now=lambda: START, wait=self.clock.wait,
                                     jitter=lambda low, high: low)
        return self.failover_

    def serve(self, failover, body=None, method='POST', target=cf.MESSAGES_PATH, fields=(),
              exchange=None):
        data = b'' if method in ('GET', 'HEAD') else json.dumps(body or messages_body()).encode()
        head = make_head(method, target, fields)
        connection = FakeConnection()
        response = cf.ClientResponse(connection, head)
        request = cf.ClientRequest(head, data, 'default')
        cf.Serving(failover, request, response, exchange or cf.Exchange(None, self.clock)).serve()
        return Answered(connection.data)

    def one(self, script, keys='ab', body=None, **changes):
        """One request over some keys' scripts; (Answered, [key ids tried])."""
        changes.setdefault('queueWaitMs', 0)
        changes.setdefault('modelFallback', {})
        answered = self.serve(self.failover(FakeUpstream(**script), make_config(*keys, **changes)),
                              body)
        return answered, [key for key, _ in self.upstream.seen]

    def cooling(self):
        return {(c.key.id, c.model): left for c, left in self.cooldowns.snapshot()}

    def record(self):
        return self.metrics.snapshot()[1][0]

    def test_a_client_that_leaves_with_its_whole_answer_was_answered(self):
        stream = chat_stream({'content': 'hello'})
        answered, _ = self.one({'x': Play(stream=[stream, cf.ClientGone()])}, keys='',
                               body=messages_body(stream=True), **with_openai('x'))
        self.assertEqual(answered.events[-1]['type'], 'message_stop')
        self.assertEqual(self.record()['outcome'], 'answered')

    def test_each_answer_of_the_first_key_has_its_consequence(self):
        """Two keys, one model: (answer of a, keys tried, what cools, client's status)."""
        pair = ('a', OPUS)
        unified = {'anthropic_ratelimit_unified_5h_status': 'rejected',
                   'anthropic_ratelimit_unified_5h_reset': str(int(START) + 1800)}
        for play, tried, cooled, status in (
                (Play(), 'a', {}, 200),
                (Play(302, {'location': 'https://elsewhere.example'}), 'a', {}, 302),
                (refusal(400, 'invalid_request_error', 'prompt is too long'), 'a', {}, 400),
                (refusal(413, 'request_too_large', 'too large'), 'a', {}, 413),
                (refusal(404, 'not_found_error', 'Not found'), 'a', {}, 404),
                (NO_CREDIT, 'ab', {('a', None): 3600}, 200),
                (refusal(402, 'billing_error', 'pay'), 'ab', {('a', None): 3600}, 200),
                (refusal(400, 'invalid_request_error', 'This organization has been disabled.'),
                 'ab', {('a', None): 3600}, 200),
                (BAD_KEY, 'ab', {('a', None): 300}, 200),
                (FORBIDDEN, 'ab', {pair: 600}, 200),
                (refusal(403, 'forbidden', 'Request not allowed'), 'ab', {}, 200),
                (Play(403, {'content-type': 'text/html'}, b'<html>VPN'), 'ab', {}, 200),
                (refusal(400, 'invalid_request_error', "You're out of extra usage. Add more."),
                 'ab', {pair: 300}, 200),
                (refusal(400, 'invalid_request_error', 'Third-party apps now draw from your extra '
                         'usage, not your plan limits.'), 'ab', {pair: 300}, 200),
                (NO_MODEL, 'ab', {pair: 3600}, 200),
                (refusal(429, 'rate_limit_error', 'x', **unified), 'ab', {('a', None): 1800}, 200),
                (RATE_LIMITED, 'ab', {pair: 20}, 200),
                (refusal(429, 'rate_limit_error', 'enforced_spend_limit_reached'), 'ab',
                 {('a', None): 3600}, 200),
                (refusal(429, 'rate_limit_error', 'Extra usage is required'), 'ab', {pair: 300},
                 200),
                (refusal(429, 'rate_limit_error', 'x', x_should_retry='true'), 'ab', {}, 200),
                (refusal(429, 'rate_limit_error', 'x'), 'ab', {pair: 30}, 200),
                (SERVER_TROUBLE, 'aab', {}, 200),
                (refusal(520, 'api_error', 'x'), 'aab', {}, 200),
                (OVERLOADED, 'ab', {pair: 10}, 200),
                (RESET, 'ab', {}, 200),
                (REFUSED, 'a', {}, 502),
                (cf.UpstreamTimeout(), 'a', {}, 504),
                (Play(stream=stream_bytes([*stream_events()[:2], OVERLOADED_EVENT])), 'ab',
                 {pair: 10}, 200),
                (Play(stream=stream_bytes(stream_events()[:1])), 'ab', {}, 200),
                (Play(stream=[stream_bytes(stream_events()[:2]), cf.UpstreamCut('cut')]), 'ab', {},
                 200),
                (Play(200, {'content-type': 'Text/Event-Stream'},
                      stream_bytes([OVERLOADED_EVENT])), 'ab', {pair: 10}, 200),
                (CUT_BODY, 'ab', {}, 200)):
            with self.subTest(play=play.__dict__ if isinstance(play, Play) else play):
                self.setUp()
                answered, seen = self.one({'a': play, 'b': Play()})
                self.assertEqual((answered.status, ''.join(seen), self.cooling()),
                                 (status, tried, cooled))
                self.assertTrue(all(response.is_closed for response in self.upstream.opened))

    def test_one_key_alone_is_tried_again_only_where_that_helps(self):
        for play, tried, status in (
                (RATE_LIMITED, 'a', 429), (SERVER_TROUBLE, 'aa', 502), (OVERLOADED, 'aa', 529),
                (BAD_KEY, 'a', 401), (FORBIDDEN, 'a', 502), (NO_MODEL, 'a', 404),
                (NO_CREDIT, 'a', 400), (RESET, 'a', 502),
                (refusal(429, 'rate_limit_error', 'x', x_should_retry='true'), 'a', 429)):
            with self.subTest(play=getattr(play, '__dict__', play)):
                self.setUp()
                answered, seen = self.one({'a': play}, 'a')
                self.assertEqual((answered.status, ''.join(seen)), (status, tried))

    def test_a_pause_precedes_the_same_key_again(self):
        waits = []
        self.clock.on_wait = waits.append
        self.one({'a': [SERVER_TROUBLE, Play()]}, 'a')
        self.assertEqual(waits, [0.5])

    def test_a_model_is_given_up_after_three_server_errors_or_two_overloads(self):
        for play, tried in ((SERVER_TROUBLE, 'aab'), (OVERLOADED, 'ab'),
                            (refusal(429, 'rate_limit_error', 'x', x_should_retry='true'), 'ab')):
            self.setUp()
            _, seen = self.one(dict.fromkeys('abcd', play), 'abcd')
            self.assertEqual(''.join(seen), tried)

    def test_no_key_of_an_unreachable_host_is_tried_but_those_of_another(self):
        for play, tried in ((REFUSED, 'ad'), (RESET, 'abd')):
            config = make_document('a', 'b', 'c', 'd', queueWaitMs=0)
            config['keys']['d']['baseUrl'] = 'https://other.example'
            upstream = FakeUpstream(a=play, b=play, c=play, d=Play())
            answered = self.serve(self.failover(upstream, cf.parse_config(config)))
            self.assertEqual((answered.status, ''.join(key for key, _ in upstream.seen)),
                             (200, tried))

    def test_three_failures_in_a_row_rest_what_failed(self):
        for _ in range(3):
            self.one({'a': RESET}, 'a')
        self.assertEqual(self.cooling(), {('a', None): 1})
        self.setUp()
        self.one({'a': SERVER_TROUBLE}, 'a')
        self.one({'a': SERVER_TROUBLE}, 'a')
        self.assertEqual(self.cooling(), {})
        self.one({'a': SERVER_TROUBLE}, 'a')
        self.assertEqual(self.cooling(), {('a', OPUS): 15})

    def test_a_fallback_model_answers_when_every_key_is_spent_for_the_first(self):
        upstream = FakeUpstream(a=[RATE_LIMITED, Play()], b=RATE_LIMITED)
        answered = self.serve(self.failover(upstream, make_config('a', 'b')))
        self.assertEqual(upstream.seen, [('a', OPUS), ('b', OPUS), ('a', SONNET)])
        self.assertEqual(answered.headers['x-proxy-fallback'], f'{OPUS} -> {SONNET}')
        self.assertEqual((answered.headers['x-proxy-key'], answered.headers['x-proxy-model'],
                          answered.headers['x-proxy-attempts'],
                          answered.headers['x-proxy-provider']),
                         ('a', SONNET, 'a=429,b=429,a/claude-sonnet-5-5=200', 'anthropic'))
        self.assertEqual(self.record()['fallback'], f'{OPUS} -> {SONNET}')

    def test_every_key_is_tried_for_each_model_of_a_chain_in_turn(self):
        upstream = FakeUpstream(a=RATE_LIMITED, b=RATE_LIMITED)
        config = make_config('a', 'b', queueWaitMs=0, modelFallback={OPUS: SONNET, SONNET: HAIKU})
        self.serve(self.failover(upstream, config))
        self.assertEqual(upstream.seen,
                         [(key, model) for model in (OPUS, SONNET, HAIKU) for key in 'ab'])

    def test_the_attempts_are_told_after_a_rotation_or_a_failure_alone(self):
        too_long = refusal(400, 'invalid_request_error', 'prompt is too long')
        for play, told in ((Play(), None), (Play(stream=stream_bytes()), None), (too_long, None),
                           (RATE_LIMITED, 'a=429'), (SERVER_TROUBLE, 'a=500,a=500'),
                           (REFUSED, 'a=unreachable'), (cf.UpstreamTimeout(), 'a=timed_out')):
            self.setUp()
            answered, _ = self.one({'a': play}, 'a', messages_body(stream=isinstance(play, Play)
                                                                   and b'event' in play.pieces[0]))
            self.assertEqual(answered.headers.get('x-proxy-attempts'), told)

    def test_a_model_in_the_list_of_attempts_cannot_be_taken_for_another_part_of_it(self):
        for model, told in (('openai/gpt-5.4', 'openai/gpt-5.4'), ('m,x=1', 'm%2Cx%3D1'),
                            ('mod\u00e8le 1', 'mod%C3%A8le%201'),
                            ('qwen3:32b', 'qwen3:32b'), ('\ud800', '%3F'), ('x' * 300, 'x' * 100)):
            self.setUp()
            config = make_config('a', **with_openai('oa', queueWaitMs=0, modelFallback={}))
            config = config._replace(openai_model_mapping={'*': model})
            answered = self.serve(
                self.failover(FakeUpstream(a=RATE_LIMITED, oa=Play(body=CHAT_HELLO)), config))
            self.assertEqual(answered.headers['x-proxy-attempts'], f'a=429,oa/{told}=200')

    def test_answers_about_the_request_itself_stop_before_the_next_model(self):
        for play in (refusal(429, 'rate_limit_error', 'x', x_should_retry='true'),
                     refusal(400, 'x', 'y')):
            upstream = FakeUpstream(a=play)
            self.serve(self.failover(upstream, make_config('a', queueWaitMs=0)))
            self.assertEqual({model for _, model in upstream.seen}, {OPUS})

    def test_a_relayed_answer_is_the_upstreams_byte_for_byte(self):
        body = (b'{"type":"error",  '
                b'"error":{"type":"invalid_request_error","message":"caf\xc3\xa9"}}\n')
        play = Play(400, {'request-id': 'req_1', 'Access-Control-Allow-Origin': '*',
                          'x-proxy-key': 'forged', 'anthropic-ratelimit-requests-remaining': '5'},
                    body)
        answered, _ = self.one({'a': play}, 'a')
        self.assertEqual(answered.body, body)
        self.assertEqual((answered.headers['request-id'], answered.headers['x-proxy-key']),
                         ('req_1', 'a'))
        self.assertEqual(answered.headers['anthropic-ratelimit-requests-remaining'], '5')
        self.assertNotIn('access-control-allow-origin', answered.headers)

    def test_the_request_goes_on_as_it_came(self):
        fields = [('User-Agent', 'claude-cli/2'), ('anthropic-version', '2026-10-21'),
                  ('x-api-key', 'mine'), ('anthropic-beta', 'x-1, y-2')]
        upstream = FakeUpstream(a=Play())
        self.serve(self.failover(upstream,
                                 make_config('a', anthropicBaseUrl='https://host.example/prefix')),
                   target='/v1/messages?beta=true', fields=fields)
        head = upstream.sent[0].head.decode()
        self.assertTrue(head.startswith('POST /prefix/v1/messages?beta=true HTTP/1.1\r\n'
                                        'host: host.example\r\n'))
        self.assertIn(f'x-api-key: {token_of("a")}\r\n', head)
        self.assertIn('anthropic-beta: x-1,y-2\r\n', head)
        self.assertIn('accept-encoding: identity\r\n',
                      head)     # a compressed answer could not be read
        self.assertIn('User-Agent: claude-cli/2\r\nanthropic-version: 2026-10-21\r\n', head)
        self.assertNotIn('mine', head)
        self.assertEqual(upstream.sent[0].body, json.dumps(messages_body()).encode())

    def test_an_oauth_token_goes_as_bearer_with_its_beta_once(self):
        document = make_document('a')
        document['keys']['a'].update(token='sk-ant-oat01-a-0123456789', type='oauth')
        for betas in ('', 'x-1, oauth-2025-04-20'):
            upstream = FakeUpstream(a=Play())
            self.serve(self.failover(upstream, cf.parse_config(document)),
                       fields=[('anthropic-beta', betas)] if betas else [])
            head = upstream.sent[0].head.decode()
            self.assertIn('authorization: Bearer sk-ant-oat01-a-0123456789\r\n', head)
            self.assertNotIn('x-api-key', head)
            self.assertEqual(head.count(cf.OAUTH_BETA), 1)

    def test_a_token_that_cannot_be_read_is_passed_over_and_named(self):
        document = make_document('a', 'b', queueWaitMs=0)
        document['keys']['a']['token'] = 'env:NOT_THERE_AT_ALL'
        answered = self.serve(self.failover(FakeUpstream(b=Play()), cf.parse_config(document)))
        self.assertEqual((answered.status, answered.headers['x-proxy-attempts']),
                         (200, 'a=no_token,b=200'))
        del document['keys']['b'], document['profiles']['default']['keyOrder'][1]
        answered = self.serve(self.failover(FakeUpstream(), cf.parse_config(document)))
        self.assertEqual(answered.status, 401)
        self.assertIn('NOT_THERE_AT_ALL is not set', answered.error['message'])

    # -- the client's own credential

    def test_pass_through_uses_and_cools_the_clients_own_credential(self):
        upstream = FakeUpstream(client=[RATE_LIMITED, Play()])
        failover = self.failover(upstream, make_config(queueWaitMs=0, modelFallback={}))
        mine, other = [('x-api-key', 'mine')], [('authorization', 'Bearer other')]
        self.assertEqual(self.serve(failover, fields=mine).status, 429)
        self.assertIn(b'x-api-key: mine\r\n', upstream.sent[0].head)
        self.assertEqual(self.serve(failover, fields=other).status, 200)
        self.assertIn(b'authorization: Bearer other\r\n', upstream.sent[1].head)
        self.assertEqual(self.serve(failover, fields=mine).status, 429)
        self.assertEqual(len(upstream.sent), 2)

    def test_a_clients_login_comes_first_where_the_order_says_so(self):
        config = make_config('a', profiles={
            'default': {'port': 0, 'priorityOrder': ['client', 'anthropic:a']}})
        upstream = FakeUpstream(client=RATE_LIMITED, a=Play())
        answered = self.serve(self.failover(upstream, config),
                              fields=[('authorization', 'Bearer login')])
        self.assertEqual(answered.headers['x-proxy-attempts'], 'client=429,a=200')
        self.assertNotIn(b'login', upstream.sent[1].head)

    def test_a_refused_login_of_the_clients_is_told_as_it_came(self):
        answered = self.serve(self.failover(FakeUpstream(client=BAD_KEY), make_config()),
                              fields=[('x-api-key', 'x')])
        self.assertEqual((answered.status, answered.json),
                         (401, api_error('authentication_error', 'invalid x-api-key')))
        self.assertNotIn('x-should-retry', answered.headers)

    def test_without_any_key_or_credential_the_answer_says_what_to_do(self):
        answered = self.serve(self.failover(FakeUpstream(), make_config()))
        self.assertEqual((answered.status, answered.headers['x-should-retry']), (401, 'false'))
        self.assertIn('python3 claude_failover.py add-key', answered.error['message'])

    # -- streams

    def stream(self, *parts, key='a', after=None):
        """Serves one streamed answer made of these pieces."""
        self.cooldowns.clear()
        upstream = FakeUpstream(a=Play(stream=list(parts)), b=after or Play())
        answered = self.serve(self.failover(upstream, make_config('a', 'b', queueWaitMs=0)),
                              body=messages_body(stream=True))
        self.assertTrue(all(response.is_closed for response in upstream.opened))
        return answered

    def test_a_stream_is_passed_on_unchanged_in_pieces_of_every_size(self):
        data = stream_bytes(stream_events('Hello, é 世界'))
        for size in (*range(1, 80), len(data)):
            with self.subTest(size=size):
                answered = self.stream(*pieces(data, size))
                self.assertEqual((answered.body, answered.is_complete), (data, True))
        self.assertEqual((self.record()['input_tokens'], self.record()['output_tokens']), (10, 5))

    def test_an_event_leaves_before_the_next_arrives(self):
        connection = FakeConnection()
        passed = []
        events = stream_events()

        class Watching(FakeUpstreamResponse):
            def read(self):
                passed.append(connection.data.count(b'event: '))
                return super().read()
        play = Play(stream=[cf.event_bytes(event) for event in events])
        upstream = FakeUpstream(a=play)
        upstream.open = lambda *args: Watching(play)
        head = cf.RequestHead('POST', cf.MESSAGES_PATH, 1, [], {})
        failover = self.failover(upstream, make_config('a'))
        request = cf.ClientRequest(head, json.dumps(messages_body(stream=True)).encode(),
                                   'default')
        cf.Serving(failover, request, cf.ClientResponse(connection, head),
                   cf.Exchange(None, self.clock)).serve()
        self.assertEqual(passed, [0, 0, 0, *range(3, len(events) + 1)])

    def test_a_stream_that_is_cut_after_its_commit_ends_with_an_error_alone(self):
        data = stream_bytes()
        for cut in (len(stream_bytes(stream_events()[:3])), len(data) // 2, len(data) // 2 + 7):
            for end in ([cf.UpstreamCut('it closed')], [cf.UpstreamTimeout()], []):
                with self.subTest(cut=cut, end=end):
                    answered = self.stream(data[:cut], *end)
                    self.assertEqual(answered.events[-1]['type'], 'error')
                    self.assertEqual(answered.events[-1]['error']['type'], 'api_error')
                    self.assertNotIn('message_stop', [event['type'] for event in answered.events])
                    self.assertTrue(answered.is_complete)   # the error is all that is left to say
                    self.assertEqual(self.record()['outcome'], 'failed')

    def test_a_missing_message_stop_is_written_when_the_message_was_whole(self):
        data = stream_bytes(stream_events()[:-1])
        for end in ([], [cf.UpstreamCut('it closed')]):
            answered = self.stream(data, *end)
            self.assertEqual((answered.events, answered.is_complete), (stream_events(), True))

    def test_a_stream_that_only_pings_is_passed_on_before_it_fills_the_memory(self):
        with mock.patch.object(cf, 'MAX_EVENT_BYTES', 100):
            answered = self.stream(*[cf.PING_EVENT] * 20, stream_bytes())
        self.assertEqual(answered.events, [{'type': 'ping'}] * 20 + stream_events())

    def test_an_error_event_after_the_commit_is_passed_on(self):
        data = stream_bytes([*stream_events()[:4], OVERLOADED_EVENT])
        answered = self.stream(data)
        self.assertEqual((answered.body, answered.is_complete), (data, True))
        self.assertEqual((self.record()['outcome'], self.record()['error']),
                         ('failed', 'Overloaded'))

    def test_an_error_that_opens_a_stream_is_answered_with_its_status(self):
        for type, status, message in (('rate_limit_error', 429, 'x'),
                                      ('overloaded_error', 529, 'x'), ('api_error', 502, 'x'),
                                      ('invalid_request_error', 400, 'bad'),
                                      ('brand_new_error', 502, 'x')):
            data = stream_bytes([{'type': 'error', 'error': {'type': type, 'message': message}}])
            with self.subTest(type=type):
                self.setUp()
                play = Play(stream=data)
                answered = self.stream(data, after=play)
                self.assertEqual((answered.status, answered.headers['content-type']),
                                 (status, 'application/json'))

    def test_a_client_that_leaves_is_recorded_and_its_upstream_closed(self):
        upstream = FakeUpstream(a=Play(stream=stream_bytes()))
        failover = self.failover(upstream, make_config('a'))
        head = cf.RequestHead('POST', cf.MESSAGES_PATH, 1, [], {})
        connection = FakeConnection()
        connection.breaks = True
        response = cf.ClientResponse(connection, head)
        request = cf.ClientRequest(head, b'{"model":"x"}', 'default')
        cf.Serving(failover, request, response, cf.Exchange(None, self.clock)).serve()
        self.assertEqual((self.record()['outcome'], response.keep_alive), ('client_gone', False))
        self.assertTrue(upstream.opened[0].is_closed)

    # -- after the commit

    def test_what_breaks_after_the_commit_rests_so_that_a_retry_meets_another_key(self):
        begun = stream_events()[:4]
        error = {'rate_limit_error': 429, 'overloaded_error': 529, 'api_error': 500,
                 'timeout_error': 504, 'odd_error': 500}
        cases = [
            ([stream_bytes([*begun, {'type': 'error', 'error': {'type': type, 'message': 'x'}}])],
             30 if status == 429 else 10) for type, status in error.items()]
        cases += [([stream_bytes(begun), stream_bytes([OVERLOADED_EVENT])], 10),
                  ([stream_bytes(begun)], 10), ([stream_bytes(begun), cf.UpstreamCut('x')], 10),
                  ([stream_bytes(begun), b'data: {"error":{"code":"server_error"}}\n\n'], 10)]
        cases += [([stream_bytes(begun), cf.UpstreamTimeout()], None),
                  ([stream_bytes(stream_events()[:-1])], None), ([stream_bytes()], None),
                  ([stream_bytes(stream_events()[:-1]), cf.UpstreamCut('x')], None),
                  ([stream_bytes([*begun, {'type': 'error', 'error': {
                      'type': 'invalid_request_error', 'message': 'x'}}])], None)]
        for parts, seconds in cases:
            with self.subTest(parts=parts):
                self.setUp()
                upstream = FakeUpstream(a=Play(stream=list(parts)), b=Play(stream=stream_bytes()))
                failover = self.failover(upstream, make_config('a', 'b', queueWaitMs=0))
                self.serve(failover, messages_body(stream=True))
                self.assertEqual(self.cooling(), {('a', OPUS): seconds} if seconds else {})
                self.serve(failover, messages_body(stream=True))
                self.assertEqual([key for key, _ in upstream.seen], ['a', 'b' if seconds else 'a'])

    def test_what_breaks_after_the_commit_of_openais_answer_rests_too(self):
        begun = chat_stream({'content': 'a'}, finish=None, is_done=False, usage=None)
        for end, cooled in ((b'data: {"error":{"code":"rate_limit_exceeded","message":"try again '
                             b'in 42s"}}\n\n', {('oa', 'gpt-5.4'): 42}),
                            (b'data: {"error":{"code":"insufficient_quota","message":"x"}}\n\n',
                             {('oa', None): 3600}),
                            (b'data: {"error":{"code":"server_error","message":"x"}}\n\n',
                             {('oa', 'gpt-5.4'): 10}), (b'', {('oa', 'gpt-5.4'): 10}),
                            (cf.UpstreamCut('x'), {('oa', 'gpt-5.4'): 10}),
                            (cf.UpstreamTimeout(), {}), (chat_stream({'content': 'b'}), {})):
            with self.subTest(end=end):
                self.cooldowns.clear()
                self.openai_one({'oa': Play(stream=[begun, end])}, keys='',
                                body=messages_body(stream=True))
                self.assertEqual(self.cooling(), cooled)

    def test_a_plain_answer_that_is_cut_after_the_commit_rests_too(self):
        long = json.dumps({**MESSAGE,
                           'content': [{'type': 'text', 'text': 'x' * cf.HELD_BYTES}]}).encode()
        for error, cooled in ((cf.UpstreamCut('x'), {('a', OPUS): 10}),
                              (cf.UpstreamTimeout(), {})):
            self.setUp()
            play = Play()
            play.pieces = [long, error]
            self.one({'a': play}, 'a')
            self.assertEqual(self.cooling(), cooled)
        play = Play()
        play.pieces = [b'file', cf.UpstreamCut('x')]
        self.cooldowns.clear()
        self.serve(self.failover(FakeUpstream(a=play), make_config('a')), method='GET',
                   target='/v1/files/x/content')
        self.assertEqual(self.cooling(), {})

    def test_what_broke_rests_before_the_client_hears_of_it(self):
        for parts in ([stream_bytes([*stream_events()[:4], OVERLOADED_EVENT])],
                      [stream_bytes(stream_events()[:4]), stream_bytes([OVERLOADED_EVENT])],
                      [stream_bytes(stream_events()[:4])]):
            self.setUp()
            connection, resting = FakeConnection(), []
            send = connection.send
            connection.send = lambda data: (send(data), b'event: error' in data and resting.append(
                self.cooling()))
            head = make_head('POST', cf.MESSAGES_PATH)
            request = cf.ClientRequest(head, json.dumps(messages_body(stream=True)).encode(),
                                       'default')
            failover = self.failover(FakeUpstream(a=Play(stream=parts)), make_config('a'))
            cf.Serving(failover, request, cf.ClientResponse(connection, head),
                       cf.Exchange(None, self.clock)).serve()
            self.assertEqual(resting, [{('a', OPUS): 10}])

    # -- silence

    def timed(self, *parts, after=(), keys='a', stream=True, body=None):
        """[(seconds, type of event), ...] that a client gets of these parts; `after` of key b."""
        connection, told = FakeConnection(), []
        send = connection.send
        connection.send = lambda data: (send(data), told.append((self.clock.now - 1000, data)))
        failover = self.failover(FakeUpstream(a=Play(stream=list(parts)),
                                              b=Play(stream=list(after))),
                                 make_config(*keys, queueWaitMs=0, modelFallback={}))
        head = make_head('POST', cf.MESSAGES_PATH)
        request = cf.ClientRequest(head, json.dumps(body or messages_body(stream=stream)).encode(),
                                   'default')
        cf.Serving(failover, request, cf.ClientResponse(connection, head),
                   cf.Exchange(None, self.clock)).serve()
        self.answered = Answered(connection.data)
        return [(at, type) for at, data in told
                for type in re.findall(r'event: (\w+)', data.decode())]

    def test_no_client_waits_in_silence_for_the_head_or_for_the_opening(self):
        events = stream_events()
        start, ping, rest = (stream_bytes(part) for part in (events[:1], events[1:2], events[2:]))
        for parts, first in (
                ([SILENCE, SILENCE, start + rest],
                 [(10, 'ping'), (20, 'ping'), (20, 'message_start'), (20, 'content_block_start')]),
                ([b'\n\n', SILENCE, SILENCE, start + rest],
                 [(10, 'ping'), (20, 'ping'), (20, 'message_start')]),
                ([start, SILENCE, SILENCE, rest],
                 [(10, 'message_start'), (10, 'ping'), (20, 'ping'), (20, 'content_block_start')]),
                ([SILENCE, start, SILENCE, SILENCE, rest],
                 [(10, 'ping'), (20, 'message_start'), (20, 'ping'), (30, 'ping'),
                  (30, 'content_block_start')]),
                ([start + ping, SILENCE, ping, ping, rest],
                 [(10, 'message_start'), (10, 'ping'), (10, 'ping'), (10, 'ping'), (10, 'ping')]),
                ([start, ping, rest],
                 [(0, 'message_start'), (0, 'ping'), (0, 'content_block_start')])):
            self.setUp()
            told = self.timed(*parts)
            self.assertEqual(told[:len(first)], first)
            self.assertEqual(([event for event in self.answered.events if event['type'] != 'ping'],
                              self.answered.is_complete),
                             ([event for event in events if event['type'] != 'ping'], True))

    def test_an_opening_that_was_not_held_any_longer_tells_a_later_error(self):
        start, error = stream_bytes(stream_events()[:1]), stream_bytes([OVERLOADED_EVENT])
        told = self.timed(start, SILENCE, error, after=[stream_bytes()], keys='ab')
        self.assertEqual(([type for _, type in told], self.upstream.seen),
                         (['message_start', 'ping', 'error'], [('a', OPUS)]))
        self.assertEqual((self.answered.headers['x-proxy-key'], self.answered.is_complete),
                         ('a', True))
        self.setUp()
        told = self.timed(start, error, after=[stream_bytes()],
                          keys='ab')    # in time: another key's turn
        self.assertEqual((self.answered.body, len(self.upstream.seen)), (stream_bytes(), 2))

    def test_while_nothing_but_pings_went_out_another_key_may_still_answer(self):
        for failing in ([SILENCE, stream_bytes([OVERLOADED_EVENT])],
                        [SILENCE, cf.UpstreamCut('x')], [SILENCE, b''], [SILENCE, b'<html>']):
            self.setUp()
            told = self.timed(*failing, after=[stream_bytes()], keys='ab')
            self.assertEqual((told[0], self.answered.events[1:]), ((10, 'ping'), stream_events()))
        self.setUp()
        self.timed(SILENCE, stream_bytes([OVERLOADED_EVENT]))
        self.assertEqual(self.answered.events[-1]['error']['type'], 'overloaded_error')

    def test_a_plain_request_waits_without_a_ping(self):
        self.timed(SILENCE, SILENCE, json.dumps(MESSAGE).encode(), stream=False)
        self.assertEqual(self.answered.json, MESSAGE)

    def test_a_whole_message_goes_on_in_a_stream_of_pings_as_its_events(self):
        for message in (MESSAGE,
                        {**MESSAGE, 'content': [{'type': 'text', 'text': 'x' * 100_000}]}):
            data = json.dumps(message).encode()
            self.setUp()
            self.timed(SILENCE, data[:60], SILENCE, data[60:])
            events = [event for event in self.answered.events if event['type'] != 'ping']
            self.assertEqual((cf.message_from_events(events)['content'],
                              self.answered.is_complete), (message['content'], True))
        self.setUp()
        self.timed(SILENCE, json.dumps(api_error('overloaded_error', 'x')).encode(),
                   after=[stream_bytes()], keys='ab')
        self.assertEqual(self.answered.events[1:], stream_events())

    def test_a_stream_of_another_server_may_take_an_hour_to_its_first_content(self):
        for url, setting, stream, limit in (('https://api.anthropic.com', None, True, 300),
                                            ('https://api.anthropic.com/v1', None, True, 300),
                                            ('http://localhost:11434', None, True, 3600),
                                            ('https://relay.example/claude', None, True, 3600),
                                            ('http://localhost:11434', None, False, 600),
                                            ('http://localhost:11434', 5000, True, 5),
                                            ('https://api.anthropic.com', 1_200_000, True, 1200)):
            for provider, play, base_url in (
                    ('a', Play(stream=stream_bytes()), 'anthropicBaseUrl'),
                    ('oa', Play(stream=pieces(chat_stream({'content': 'x'}), 200)),
                     'openaiBaseUrl')):
                self.setUp()
                config = make_config(*('a' if provider == 'a' else ''),
                                     **(with_openai('oa') if provider == 'oa' else {}),
                                     **{base_url: url.replace('anthropic', 'openai')
                                        if provider == 'oa' else url, 'firstByteMs': setting})
                answered = self.serve(self.failover(FakeUpstream(**{provider: play}), config),
                                      messages_body(stream=stream))
                self.assertEqual((answered.status, self.upstream.first_byte_s), (200, [limit]))
                if stream:
                    self.assertEqual(self.upstream.opened[0].idle_s,
                                     cf.STREAM_IDLE_S)  # once it has content
        document = make_document(**with_openai('oa'))
        document['openaiKeys']['oa']['token'] = make_login()
        play = Play(stream=responses_stream(text_delta('a'), completed()))
        self.serve(self.failover(FakeUpstream(login=play), cf.parse_config(document)),
                   messages_body(stream=True))
        self.assertEqual(self.upstream.first_byte_s, [300])

    def test_pings_come_wherever_the_wish_for_a_stream_stands(self):
        far = {'model': OPUS, 'messages': [{'role': 'user', 'content': 'x' * 3000}],
               'stream': True, 'system': 'x' * 3000}
        self.assertEqual(self.timed(SILENCE, stream_bytes(), body=far)[0], (10, 'ping'))

    # -- repairs

    def test_a_fallback_model_is_sent_what_it_takes_and_that_is_remembered(self):
        complaint = refusal(400, 'invalid_request_error',
                            'thinking.type: adaptive is not supported by this model')

        def sonnet(body):
            return complaint if 'thinking' in body else Play()

        def play(body):
            return RATE_LIMITED if body['model'] == OPUS else sonnet(body)
        upstream = FakeUpstream(a=[play, play])
        failover = self.failover(upstream, make_config('a', queueWaitMs=0))
        body = messages_body(thinking={'type': 'adaptive'})
        self.assertEqual(self.serve(failover, body).status, 200)
        self.assertEqual([model for _, model in upstream.seen], [OPUS, SONNET, SONNET])
        self.assertEqual(self.serve(failover, body).status, 200)
        self.assertEqual([model for _, model in upstream.seen][3:], [SONNET])
        self.assertEqual(self.serve(failover, {**body, 'model': SONNET}).status,
                         400)   # asked for: relayed

    def test_several_complaints_are_mended_one_by_one_and_one_that_stays_is_told(self):
        def sonnet(body):
            for field in ('thinking', 'context_management', 'tags'):
                if field in body:
                    return refusal(400, 'invalid_request_error',
                                   f'{field}: Extra inputs are not permitted')
            return Play()

        def play(body):
            return RATE_LIMITED if body['model'] == OPUS else sonnet(body)
        body = messages_body(thinking={}, context_management={}, tags=[])
        upstream = FakeUpstream(a=[play, play])
        self.assertEqual(self.serve(self.failover(upstream, make_config('a', queueWaitMs=0)),
                                    body).status, 200)
        stubborn = refusal(400, 'invalid_request_error', 'thinking: no')
        self.setUp()
        upstream = FakeUpstream(a=[RATE_LIMITED, stubborn])
        self.assertEqual(self.serve(self.failover(upstream, make_config('a', queueWaitMs=0)),
                                    body).status, 429)
        self.assertEqual(len(upstream.seen), 3)

    def test_a_refused_signature_is_not_remembered_with_what_is(self):
        thinking = {'type': 'thinking', 'thinking': 'hm', 'signature': 'foreign'}
        body = messages_body(output_config={'effort': 'high'}, messages=[
            {'role': 'assistant', 'content': [thinking, {'type': 'text', 'text': 'x'}]},
            {'role': 'user', 'content': 'y'}])

        def play(sent):
            if sent['model'] == OPUS:
                return RATE_LIMITED
            if 'foreign' in json.dumps(sent):
                return refusal(400, 'x',
                               'messages.0.content.0: Invalid `signature` in `thinking` block')
            return (refusal(400, 'x', 'effort is not supported') if 'effort' in json.dumps(sent)
                    else Play())
        upstream = FakeUpstream(a=[play, play])
        failover = self.failover(upstream, make_config('a', queueWaitMs=0))
        self.assertEqual(self.serve(failover, body).status, 200)
        other = messages_body(messages=[{'role': 'assistant',
                                         'content': [{**thinking, 'signature': 'valid'}]},
                                        {'role': 'user', 'content': 'y'}])
        self.serve(failover, other)
        self.assertIn('valid', upstream.sent[-1].body.decode())

    def test_thinking_with_a_signature_that_is_refused_goes_once_without(self):
        complaint = refusal(400, 'invalid_request_error',
                            'messages.0.content.0: Invalid `signature` in `thinking` block')
        thinking = {'type': 'thinking', 'thinking': 'hm', 'signature': 'foreign'}
        body = messages_body(messages=[{'role': 'assistant',
                                        'content': [thinking, {'type': 'text', 'text': 'x'}]},
                                       {'role': 'user', 'content': 'y'}])
        upstream = FakeUpstream(a=lambda sent: complaint if 'foreign' in json.dumps(sent)
                                else Play())
        failover = self.failover(upstream, make_config('a'))
        self.assertEqual(self.serve(failover, body).status, 200)
        self.assertEqual(len(upstream.seen), 2)
        self.serve(failover, body)
        self.assertEqual(len(upstream.seen), 4)       # the next conversation keeps its thinking

    # -- never locked out

    def again(self, body=None, **options):
        """The same failover serves once more; (status, keys tried since the last time)."""
        before = len(self.upstream.seen)
        answered = self.serve(self.failover_, body, **options)
        return answered.status, ''.join(key for key, _ in self.upstream.seen[before:])

    def with_token_file(self, text=token_of('old'), **changes):
        folder = tempfile.mkdtemp(prefix='failover-test-')
        self.addCleanup(shutil.rmtree, folder)
        self.token_path = os.path.join(folder, 'token')
        self.write_token(text)
        document = make_document('a', queueWaitMs=0, modelFallback={}, **changes)
        document['keys']['a']['token'] = f'file:{self.token_path}'
        return document

    def write_token(self, text):
        with open(self.token_path, 'w') as file:
            file.write(text)

    def test_another_secret_in_the_file_was_not_refused(self):
        for play in (BAD_KEY, NO_CREDIT, FORBIDDEN, RATE_LIMITED, LONG):
            with self.subTest(play=play.__dict__):
                self.setUp()
                upstream = FakeUpstream(old=play, new=Play())
                self.serve(self.failover(upstream, cf.parse_config(self.with_token_file())))
                self.write_token(token_of('new'))
                self.assertEqual(self.again(), (200, 'new'))

    def test_a_login_that_is_renewed_while_the_request_runs_is_used_by_it(self):
        def renew(body):
            self.write_token(token_of('new'))
            return BAD_KEY
        upstream = FakeUpstream(old=renew, new=Play())
        answered = self.serve(self.failover(upstream, cf.parse_config(self.with_token_file())))
        self.assertEqual((answered.status, self.cooling()), (200, {}))

    def test_a_codex_login_that_is_renewed_is_used(self):
        logins = iter((make_login(exp=START + 10), make_login(exp=START + 20)))
        document = make_document(queueWaitMs=0, **with_openai('x'))
        path = self.with_token_file(json.dumps({'tokens': {'access_token': next(logins)}}))
        document['openaiKeys']['x']['token'] = path['keys']['a']['token']
        stream = responses_stream(text_delta('hi'), completed())
        upstream = FakeUpstream(login=[openai_refusal(401, 'token_revoked'), Play(stream=stream)])
        self.assertEqual(self.serve(self.failover(upstream, cf.parse_config(document))).status,
                         401)
        self.write_token(json.dumps({'tokens': {'access_token': next(logins)}}))
        self.assertEqual(self.again(), (200, 'login'))

    def test_what_a_person_mended_works_at_the_next_request(self):
        for play in (BAD_KEY, FORBIDDEN, NO_CREDIT, NO_MODEL, refusal(402, 'billing_error', 'pay'),
                     refusal(400, 'x',
                             'You have reached your specified API usage limits. You will regain '
                             'access on 2033-11-20 at 00:00 UTC.'),
                     refusal(400, 'x', 'This organization has been disabled.'),
                     refusal(400, 'x', "You're out of extra usage"),
                     refusal(429, 'rate_limit_error', 'enforced_spend_limit_reached')):
            for keys in ('a', 'ab'):
                with self.subTest(play=play.__dict__, keys=keys):
                    self.setUp()
                    script = dict.fromkeys(keys, [play, Play()])
                    self.assertNotEqual(self.one(script, keys)[0].status, 200)
                    self.assertEqual(self.again()[0], 200)

    def test_what_was_not_mended_is_asked_once_in_five_seconds(self):
        self.one({'a': NO_CREDIT}, 'a')
        self.assertEqual([self.again() for _ in range(3)], [(400, 'a'), (400, ''), (400, '')])
        self.clock.now += cf.HOPE_S
        self.assertEqual(self.again(), (400, 'a'))

    def test_a_limit_that_is_over_bars_no_hope(self):
        for limit in (RATE_LIMITED, OVERLOADED):
            self.setUp()
            self.one({'a': [limit, NO_CREDIT, Play()]}, 'a')
            self.clock.now += 21
            self.again()                                        # 400, no credit
            self.clock.now += 10
            self.assertEqual(self.again(), (200, 'a'))
        self.setUp()
        self.one({'a': [RATE_LIMITED, REFUSED]}, 'a')
        self.clock.now += 21
        for _ in range(6):
            self.again()
        self.upstream.script = {'a': [Play()]}
        self.assertEqual(self.again(), (200, 'a'))

    def test_with_several_dead_keys_the_one_that_was_mended_is_found_at_once(self):
        self.one({'a': BAD_KEY, 'b': NO_CREDIT})
        self.upstream.script['b'] = [Play()]
        self.assertEqual(self.again()[0], 200)

    def test_without_a_queue_nobody_is_refused_for_the_sake_of_the_line(self):
        failover = self.failover(FakeUpstream(a=Play()), make_config('a', queueWaitMs=0))
        key, inner = self.store.current.keys['anthropic:a'], []
        self.cooldowns.cool(key, cf.Slot(key.ref),
                            cf.Outcome(rule('window_spent'), 429, 'x', 5), 3600)
        self.clock.now += 6

        def first(body):
            inner.append(self.serve(failover).status)           # a second one meanwhile
            return Play()
        self.upstream.script['a'] = [first, Play()]
        self.assertEqual((self.serve(failover).status, inner), (200, [200]))

    def test_a_stand_ins_refusal_keeps_nobody_from_waiting_for_the_asked_model(self):
        for keys in ('a', 'ab', 'abc'):
            self.setUp()
            limited = iter([refusal(429, 'rate_limit_error', 'x', retry_after='6')] * len(keys))

            def play(body, limited=limited):
                if body['model'] == SONNET:
                    return refusal(400, 'invalid_request_error', 'prompt is too long')
                return next(limited, Play())
            upstream = FakeUpstream(**dict.fromkeys(keys, play))
            answered = self.serve(self.failover(upstream, make_config(*keys)))
            self.assertEqual((answered.status, answered.headers['x-proxy-model']), (200, OPUS))

    def test_what_fails_in_passing_keeps_nobody_from_waiting_for_what_comes_back(self):
        limited = refusal(429, 'rate_limit_error', 'x', retry_after='6')
        for trouble in (SERVER_TROUBLE, refusal(403, 'forbidden', 'no'), CUT_BODY, BAD_KEY,
                        NO_MODEL):
            self.setUp()
            upstream = FakeUpstream(a=[limited, Play()], b=trouble)
            answered = self.serve(self.failover(upstream, make_config('a', 'b', modelFallback={})))
            self.assertEqual(answered.status, 200)

    def test_a_relay_that_lacks_a_model_on_another_path_is_no_crash(self):
        document = make_document('a', queueWaitMs=0)
        document['keys']['a']['baseUrl'] = 'https://relay.example'
        for method, target in (('GET', '/v1/models/x'), ('POST', '/v1/x/y'),
                               ('DELETE', '/v1/files/x')):
            self.setUp()
            upstream = FakeUpstream(a=refusal(404, 'x', 'The model `x` does not exist'))
            failover = self.failover(upstream, cf.parse_config(document))
            self.assertEqual(self.serve(failover, {'x': 1}, method=method, target=target).status,
                             404)

    def test_what_a_key_may_not_do_elsewhere_says_nothing_about_messages(self):
        failover = self.failover(FakeUpstream(a=[BAD_KEY, Play()], b=[BAD_KEY, Play()]),
                                 make_config('a', 'b', queueWaitMs=0))
        self.assertNotEqual(self.serve(failover, method='GET',
                                       target='/v1/organizations/me').status, 200)
        self.assertEqual(self.cooling(), {})

    def test_a_hope_is_no_reason_to_pass_over_what_is_ready(self):
        self.one({'a': NO_CREDIT, 'b': Play()})
        self.assertEqual(self.again(), (200, 'b'))

    def test_a_spent_window_that_was_lifted_is_noticed_in_minutes(self):
        spent = refusal(429, 'rate_limit_error', 'x',
                        anthropic_ratelimit_unified_5h_status='rejected',
                        anthropic_ratelimit_unified_5h_reset=str(int(START) + 4 * 3600))
        self.one({'a': [spent, Play()]}, 'a')
        self.clock.now += 299
        self.assertEqual(self.again(), (429, ''))
        self.clock.now += 1
        self.assertEqual(self.again(), (200, 'a'))

    def test_a_block_page_is_the_networks_word_and_cools_no_key(self):
        for block in (refusal(403, 'forbidden', 'Request not allowed'),
                      Play(403, {'content-type': 'text/html'}, b'<html>Blocked')):
            self.setUp()
            answered, _ = self.one({'a': block, 'b': block})
            self.assertEqual((answered.status, answered.error['type'], self.cooling()),
                             (502, 'api_error', {}))
            for _ in range(4):                    # it is asked as long as nothing else is left
                self.assertEqual(self.again()[0], 502)
            self.upstream.script = {'a': [Play()], 'b': [Play()]}
            self.assertEqual(self.again()[0], 200)

    def test_a_request_meets_a_server_that_is_back_whatever_came_before(self):
        for trouble in (REFUSED, RESET, SERVER_TROUBLE, CUT_BODY):
            with self.subTest(trouble=getattr(trouble, '__dict__', trouble)):
                self.setUp()
                self.one({'a': trouble, 'b': trouble})
                for _ in range(6):
                    self.assertEqual(self.again()[0], 502)
                self.upstream.script = {'a': [Play()], 'b': [Play()]}
                self.assertEqual(self.again()[0], 200)

    def test_a_waiting_request_is_served_within_a_second_of_the_networks_return(self):
        back_at = self.clock.now + 20
        upstream = FakeUpstream(a=lambda body: Play() if self.clock.now >= back_at else REFUSED)
        failover = self.failover(upstream, make_config('a', modelFallback={}))
        for _ in range(3):
            self.assertIn(self.serve(failover).status, (200, 502))
        self.assertEqual(self.serve(failover).status, 200)
        self.assertLessEqual(self.clock.now - back_at, 1)

    # -- extra usage

    PAID = {'anthropic-ratelimit-unified-overage-in-use': 'true',
            'anthropic-ratelimit-unified-reset': str(int(START) + 3600)}

    def test_a_key_that_is_paid_beside_its_plan_comes_after_one_with_quota(self):
        summary = {'anthropic-ratelimit-unified-status': 'rejected',
                   'anthropic-ratelimit-unified-overage-status': 'allowed_warning',
                   'anthropic-ratelimit-unified-reset': str(int(START) + 3600)}
        for fields in (self.PAID, summary):
            self.setUp()
            self.one({'a': Play(200, fields), 'b': [Play(), RATE_LIMITED, Play()]})
            self.assertEqual(self.again(), (200, 'b'))
            self.assertEqual(self.again(), (200, 'ba'))       # rather than none
            self.clock.now += 3601
            self.upstream.script['a'] = [Play()]
            self.assertEqual(self.again(), (200, 'a'))

    # -- whose refusal it is

    def test_what_a_stand_in_refuses_is_not_the_clients(self):
        """Opus is limited for a moment; its fallback, or OpenAI, refuses the request itself."""
        for status, type, message in ((400, 'invalid_request_error',
                                       'prompt is too long: 210000 tokens'),
                                      (413, 'request_too_large', 'too large'), (422, 'x', 'no'),
                                      (400, 'invalid_request_error', 'messages.3: whatever')):
            with self.subTest(message=message):
                refuse = refusal(status, type, message)
                self.setUp()
                answered, seen = self.one({'a': lambda body: RATE_LIMITED if body['model'] == OPUS
                                           else refuse}, 'a', modelFallback={OPUS: SONNET})
                self.assertEqual((answered.status, seen), (429, ['a', 'a']))
                self.assertNotIn(message, answered.error['message'])
                self.assertEqual(answered.headers['retry-after'], '20')
                self.setUp()
                answered, seen = self.openai_one(
                    {'a': RATE_LIMITED, 'oa': openai_refusal(status, type, message)})
                self.assertEqual((answered.status, len(seen)), (429, 2))

    def test_another_server_of_the_fallback_may_take_what_one_refuses(self):
        config = make_document('a', 'b', 'c', queueWaitMs=0)
        config['keys']['c']['baseUrl'] = 'https://other.example'

        def play(body):
            return RATE_LIMITED if body['model'] == OPUS else refusal(400, 'x',
                                                                      'prompt is too long')
        upstream = FakeUpstream(a=play, b=play, c=[RATE_LIMITED, Play()])
        answered = self.serve(self.failover(upstream, cf.parse_config(config)))
        self.assertEqual(answered.status, 200)
        self.assertEqual(''.join(key for key, _ in upstream.seen), 'abcac')

    def test_a_fallback_is_sent_without_fast_mode(self):
        def play(body):
            return RATE_LIMITED if body['model'] == OPUS else Play()
        upstream = FakeUpstream(a=play)
        self.serve(self.failover(upstream, make_config('a', queueWaitMs=0)),
                   messages_body(speed='fast'),
                   fields=[('anthropic-beta', 'fast-mode-2026-02-01,x-1')])
        self.assertEqual([model for _, model in upstream.seen], [OPUS, OPUS, SONNET])
        self.assertEqual([b'"speed"' in sent.body for sent in upstream.sent], [True, False, False])
        for sent in upstream.sent[1:]:
            self.assertIn(b'anthropic-beta: x-1\r\n', sent.head)

    def test_a_limit_of_long_context_leaves_the_plain_model(self):
        fields = [('anthropic-beta', 'context-1m-2025-08-07')]
        failover = self.failover(FakeUpstream(a=[RATE_LIMITED, Play()], b=[RATE_LIMITED, Play()]),
                                 make_config('a', 'b', modelFallback={}, queueWaitMs=0))
        self.assertEqual(self.serve(failover, fields=fields).status, 429)
        self.assertEqual(self.again(fields=fields), (429, ''))
        self.assertEqual(self.again(), (200, 'a'))

    def test_where_fast_mode_is_limited_the_same_model_answers_without_it(self):
        for wait_ms in (0, 60_000):
            self.setUp()
            upstream = FakeUpstream(a=[RATE_LIMITED, Play()], b=[RATE_LIMITED, Play()])
            failover = self.failover(upstream, make_config('a', 'b', queueWaitMs=wait_ms))
            self.assertEqual(self.serve(failover, messages_body(speed='fast')).status, 200)
            self.assertEqual(upstream.seen, [('a', OPUS), ('b', OPUS), ('a', OPUS)])
            self.assertEqual([b'"speed"' in sent.body for sent in upstream.sent],
                             [True, True, False])

    # -- gateways

    def at_relays(self, *plays, ids='abc', **changes):
        """Keys at these servers: those of one letter share one."""
        config = make_document(*ids, queueWaitMs=0, modelFallback={}, **changes)
        for id in ids:
            config['keys'][id]['baseUrl'] = f'https://{id}.example'
        upstream = FakeUpstream(**dict(zip(ids, plays)))
        answered = self.serve(self.failover(upstream, cf.parse_config(config)))
        return answered, ''.join(key for key, _ in upstream.seen)

    def test_each_server_is_asked_whatever_others_answer(self):
        for play in (refusal(502, 'api_error', 'bad gateway'), SERVER_TROUBLE, OVERLOADED,
                     Play(503, {'content-type': 'text/html'}, b'<html>no'),
                     refusal(429, 'rate_limit_error', 'x', x_should_retry='true'), REFUSED, RESET):
            with self.subTest(play=getattr(play, '__dict__', play)):
                self.setUp()
                answered, tried = self.at_relays(play, play, play, Play(), ids='abcd')
                self.assertEqual((answered.status, tried[-1]), (200, 'd'), tried)

    def test_a_relays_unknown_model_is_no_answer(self):
        for status, message in (
                (400, 'invalid model'), (404, 'No endpoints found for claude-opus-5-5.'),
                (400, f'The model `{OPUS}` does not exist'), (404, 'model_not_found'),
                (400, f'Unknown model: {OPUS}'), (400, f'model {OPUS} is not supported'),
                (403, f'This key does not have access to model {OPUS}')):
            with self.subTest(message=message):
                self.setUp()
                answered, tried = self.at_relays(refusal(status, 'invalid_request_error', message),
                                                 Play())
                self.assertEqual((answered.status, tried), (200, 'ab'))
                self.assertEqual(self.cooling(), {('a', OPUS): 3600})
                self.setUp()
                answered, tried = self.at_relays(*[refusal(status, 'x', message)] * 3)
                self.assertEqual((answered.status, tried), (status, 'abc'))

    def test_an_overload_is_waited_for_however_many_keys_there_are(self):
        for keys in ('a', 'ab', 'abc', 'abcdef'):
            with self.subTest(keys=keys):
                self.setUp()
                back_at = self.clock.now + 5
                upstream = FakeUpstream(**dict.fromkeys(
                    keys, lambda body: Play() if self.clock.now >= back_at else OVERLOADED))
                answered = self.serve(self.failover(upstream,
                                                    make_config(*keys, modelFallback={})))
                self.assertEqual(answered.status, 200)

    # -- clocks

    def test_resets_are_read_against_the_upstreams_clock(self):
        """A machine two hours behind: the upstream's limit ends in three seconds all the same."""
        there = START + 7200
        date = email.utils.formatdate(there, usegmt=True)
        for fields in ({'anthropic-ratelimit-requests-remaining': '0',
                        'anthropic-ratelimit-requests-reset': cf.utc_text(there + 3)},
                       {'anthropic-ratelimit-unified-5h-status': 'rejected',
                        'anthropic-ratelimit-unified-5h-reset': str(int(there) + 3)},
                       {'retry-after': email.utils.formatdate(there + 3, usegmt=True)}):
            self.setUp()
            self.one({'a': Play(429, {'date': date, **fields},
                                api_error('rate_limit_error', 'x'))}, 'a')
            self.assertEqual(list(self.cooling().values()), [3], fields)

    def test_what_is_told_is_when_the_limit_ends_and_not_when_it_is_tried_again(self):
        spent = refusal(429, 'rate_limit_error', 'x',
                        anthropic_ratelimit_unified_5h_status='rejected',
                        anthropic_ratelimit_unified_5h_reset=str(int(START) + 4 * 3600))
        answered, _ = self.one({'a': spent}, 'a')
        self.assertEqual(answered.headers['retry-after'], '14400')
        self.assertIn('a with claude-opus-5-5 (back in 4 h, tried again in 60 min)',
                      answered.error['message'])
        answered = self.serve(self.failover_)                 # from memory like from the source
        self.assertEqual(answered.headers['anthropic-ratelimit-unified-5h-reset'],
                         str(int(START) + 4 * 3600))
        self.assertEqual(answered.headers['retry-after'], '14400')

    def test_the_earlier_of_a_reset_and_retry_after_is_when_it_is_asked(self):
        spent = refusal(429, 'rate_limit_error', 'x', retry_after='60',
                        anthropic_ratelimit_unified_5h_status='rejected',
                        anthropic_ratelimit_unified_5h_reset=str(int(START) + 1800))
        answered, _ = self.one({'a': spent}, 'a')
        self.assertEqual((self.cooling(), answered.headers['retry-after']),
                         ({('a', None): 60}, '1800'))

    def test_retry_after_in_milliseconds_counts_and_what_came_twice_counts_once(self):
        for fields, seconds in (({'retry-after-ms': '1500'}, 1.5), ({'retry-after': '20, 20'}, 20),
                                ({'retry-after-ms': '2500, 2500', 'retry-after': '9'}, 2.5)):
            self.setUp()
            self.one({'a': Play(429, fields, api_error('rate_limit_error', 'x'))}, 'a')
            self.assertEqual(self.cooling(), {('a', OPUS): seconds})

    # -- conversations

    SESSION = [('x-claude-code-session-id', 's1')]
    BIG = {**MESSAGE,
           'usage': {'input_tokens': 10, 'output_tokens': 5, 'cache_read_input_tokens': 90_000}}

    def turn(self, session='s1', body=None):
        """Another turn of a conversation; (status, keys tried, x-proxy-sticky)."""
        before = len(self.upstream.seen)
        fields = [('x-claude-code-session-id', session)] if session else ()
        answered = self.serve(self.failover_, body, fields=fields)
        tried = ''.join(key for key, _ in self.upstream.seen[before:])
        return answered.status, tried, answered.headers.get('x-proxy-sticky')

    def converse(self, script, keys='ab', **changes):
        """A conversation with keys of one kind, which has begun; the keys tried."""
        changes = {'queueWaitMs': 0, 'modelFallback': {}, **changes}
        upstream = FakeUpstream(**script)
        self.serve(self.failover(upstream, make_config(*keys, **changes)), fields=self.SESSION)
        return ''.join(key for key, _ in upstream.seen)

    def test_a_conversation_stays_where_its_cache_is_though_an_earlier_key_is_back(self):
        self.assertEqual(self.converse({'a': [RATE_LIMITED, Play()], 'b': Play()}), 'ab')
        self.clock.now += 21
        self.assertEqual(self.turn(), (200, 'b', 'stay'))
        self.assertEqual(self.turn('s2'), (200, 'a', None))            # a new one: the order
        self.assertEqual(self.turn(None), (200, 'a', None))
        self.clock.now += cf.CACHE_S
        self.assertEqual(self.turn(), (200, 'a', None))                # its cache is gone

    def test_it_moves_where_its_key_is_gone_for_long(self):
        self.converse({'a': [Play(), LONG], 'b': Play()})
        self.assertEqual(self.turn(), (200, 'ab', 'move'))
        self.assertEqual((self.record()['moved_because'], self.record()['conversation']),
                         ('rate_limited', cf.conversation_digest(dict(self.SESSION), b'')[:8]))
        self.assertEqual(self.turn(), (200, 'b', 'stay'))

    def test_strict_order_knows_no_conversations(self):
        self.converse({'a': [RATE_LIMITED, Play()], 'b': Play()}, stickyMs=0)
        self.clock.now += 21
        self.assertEqual(self.turn(), (200, 'a', None))

    def test_a_plan_is_never_passed_over_for_a_paid_key(self):
        document = make_document('a', 'b', queueWaitMs=0, modelFallback={})
        document['keys']['a'].update(token='sk-ant-oat01-a-0123456789', type='oauth')
        upstream = FakeUpstream(a=[RATE_LIMITED, Play()], b=Play())
        self.serve(self.failover(upstream, cf.parse_config(document)), fields=self.SESSION)
        self.clock.now += 21
        self.assertEqual(self.turn(), (200, 'a', 'move'))

    def test_it_waits_for_its_own_key_where_that_is_cheaper_than_to_move(self):
        """(retry-after, prompt tokens, stickyWaitMs, keys tried, sticky)"""
        for seconds, tokens, wait_ms, tried, sticky in (
                ('2', 90_000, 5000, 'aa', 'wait'), ('4', 90_000, 5000, 'aa', 'wait'),
                ('5', 90_000, 5000, 'ab', 'move'), ('2', 30_000, 5000, 'ab', 'move'),
                ('2', 90_000, 1000, 'ab', 'move'), ('2', 90_000, 0, 'ab', 'move')):
            with self.subTest(seconds=seconds, tokens=tokens, wait_ms=wait_ms):
                self.setUp()
                big = {**MESSAGE, 'usage': {'input_tokens': tokens, 'output_tokens': 5}}
                limited = refusal(429, 'rate_limit_error', 'x', retry_after=seconds)
                self.converse({'a': [Play(body=big), limited, Play()], 'b': Play()},
                              stickyWaitMs=wait_ms)
                self.assertEqual(self.turn(), (200, tried, sticky))

    def test_a_wait_for_its_own_key_has_an_end(self):
        limited = refusal(429, 'rate_limit_error', 'x', retry_after='2')
        self.converse({'a': [Play(body=self.BIG), limited], 'b': Play()})
        before = self.clock.now
        self.assertEqual(self.turn(), (200, 'aaab', 'move'))
        self.assertLessEqual(self.clock.now - before, 5)

    def test_a_key_that_is_nearly_spent_keeps_the_rest_for_its_own_conversations(self):
        nearly = {'anthropic-ratelimit-unified-5h-utilization': '0.985',
                  'anthropic-ratelimit-unified-5h-reset': str(int(START) + 3600)}
        self.assertEqual(self.converse({'a': Play(200, nearly), 'b': Play()}), 'a')
        self.assertEqual(self.turn('s2'), (200, 'b', None))
        self.assertEqual(self.turn('s1'), (200, 'a', 'stay'))

    def strategy(self, name, script, **changes):
        document = make_document(*script, queueWaitMs=0, modelFallback={}, **changes)
        document['profiles']['default']['strategy'] = name
        self.failover(FakeUpstream(**script), cf.parse_config(document))

    def test_new_conversations_are_spread_where_the_strategy_says_so(self):
        self.strategy('spread', dict.fromkeys('abc', Play()))
        self.assertEqual([self.turn(f's{n}')[1] for n in range(6)], list('abcabc'))
        self.assertEqual([self.turn(f's{n}')[1:] for n in range(6)],
                         [(key, 'stay') for key in 'abcabc'])

    def test_a_key_with_larger_limits_takes_more_of_them(self):
        limits = {key: {'anthropic-ratelimit-input-tokens-limit': limit}
                  for key, limit in (('a', '30000'), ('b', '60000'))}
        self.strategy('spread', {key: Play(200, fields) for key, fields in limits.items()})
        for key, fields in limits.items():
            self.metrics.note_limits(f'anthropic:{key}', {**fields, 'anthropic-ratelimit-x': ''})
        tried = ''.join(self.turn(f's{n}')[1] for n in range(6))
        self.assertEqual((tried.count('a'), tried.count('b')), (2, 4))

    def test_a_key_whose_limits_are_not_known_takes_as_many_as_others(self):
        self.strategy('spread', dict.fromkeys('ab', Play()))
        self.metrics.note_limits('anthropic:b',
                                 {'anthropic-ratelimit-input-tokens-limit': '30000'})
        self.assertEqual(''.join(self.turn(f's{n}')[1] for n in range(4)), 'abab')

    def test_what_would_be_lost_first_is_drained_first(self):
        def window(seconds, used='0.5'):
            return Play(200, {'anthropic-ratelimit-unified-5h-utilization': used,
                              'anthropic-ratelimit-unified-5h-reset': str(int(START) + seconds)})
        self.strategy('drain', {'a': window(9000), 'b': window(3000), 'c': window(1000, '0.99')})
        for key in 'abc':
            self.metrics.note_limits(f'anthropic:{key}', self.upstream.script[key][0].headers)
        self.assertEqual([self.turn(f's{n}')[1] for n in range(3)], list('bbb'))

    def test_keys_of_one_organization_cool_together_for_a_minutes_limit(self):
        org = {'anthropic-organization-id': 'o1', 'anthropic-ratelimit-requests-remaining': '5'}
        for key in 'ab':
            self.metrics.note_limits(f'anthropic:{key}', org)
        for remaining, tried in ((None, 'ac'), ('20', 'ac'), ('3999', 'ab')):
            fields = {'anthropic_ratelimit_requests_limit': '4000',
                      'anthropic_ratelimit_requests_remaining': remaining}
            limited = refusal(429, 'rate_limit_error', 'x', retry_after='20',
                              anthropic_organization_id='o1', **fields if remaining else {})
            self.setUp()
            for key in 'ab':
                self.metrics.note_limits(f'anthropic:{key}', org)
            self.one({'a': limited, 'b': Play(), 'c': Play()}, 'abc')
            self.assertEqual(''.join(key for key, _ in self.upstream.seen), tried)
        self.setUp()
        for key in 'ab':
            self.metrics.note_limits(f'anthropic:{key}', org)
        self.one({'a': BAD_KEY, 'b': Play()})
        self.assertEqual([key for key, _ in self.upstream.seen], ['a', 'b'])

    def test_a_model_that_is_overloaded_for_a_moment_is_waited_for(self):
        """(seconds for which Opus is overloaded, patience, who answers)"""
        for seconds, patience_ms, model in ((3, 5000, OPUS), (3, 0, SONNET), (60, 5000, SONNET),
                                            (3, 1000, SONNET)):
            for keys in ('a', 'ab'):
                with self.subTest(seconds=seconds, patience_ms=patience_ms, keys=keys):
                    self.setUp()
                    back_at = self.clock.now + seconds

                    def play(body, back_at=back_at):
                        return (OVERLOADED if body['model'] == OPUS and self.clock.now < back_at
                                else Play())
                    upstream = FakeUpstream(**dict.fromkeys(keys, play))
                    answered = self.serve(self.failover(
                        upstream, make_config(*keys, fallbackPatienceMs=patience_ms)))
                    self.assertEqual((answered.status, answered.headers['x-proxy-model']),
                                     (200, model))
                    self.assertLessEqual(self.clock.now - 1000, 7)
                    self.assertLessEqual(len(upstream.seen), 9)

    def test_a_brief_limit_is_waited_for_before_a_lower_model_answers(self):
        for seconds, model in (('3', OPUS), ('20', SONNET)):
            self.setUp()
            limited = iter([refusal(429, 'rate_limit_error', 'x', retry_after=seconds)])

            def play(body, limited=limited):
                return next(limited, Play()) if body['model'] == OPUS else Play()
            answered = self.serve(self.failover(FakeUpstream(a=play), make_config('a')))
            self.assertEqual(answered.headers['x-proxy-model'], model)

    def test_who_fell_back_stays_for_a_minute_or_until_the_model_was_proved(self):
        for proved, seconds, model in ((False, 30, SONNET), (False, 61, OPUS), (True, 30, OPUS)):
            with self.subTest(proved=proved, seconds=seconds):
                self.setUp()
                limited = iter([LONG, LONG])

                def play(body, limited=limited):
                    return next(limited, Play()) if body['model'] == OPUS else Play()
                upstream = FakeUpstream(a=play)
                self.serve(self.failover(upstream, make_config('a', queueWaitMs=0)),
                           fields=self.SESSION)
                self.cooldowns.clear()
                next(limited)
                self.clock.now += 1
                if proved:
                    self.turn('s2')
                self.clock.now += seconds - 1
                self.turn()
                self.assertEqual(upstream.seen[-1], ('a', model))

    # -- other paths

    def test_reads_rotate_and_writes_without_a_model_do_not(self):
        for method, target, tried, status in (
                ('GET', '/v1/models', 'ab', 200), ('GET', '/v1/messages/batches/x', 'ab', 200),
                ('POST', '/v1/messages/batches', 'a', 401), ('POST', '/v1/files', 'a', 401),
                ('DELETE', '/v1/files/x', 'ab', 200)):
            with self.subTest(target=target):
                self.setUp()
                upstream = FakeUpstream(a=BAD_KEY, b=Play())
                answered = self.serve(self.failover(upstream, make_config('a', 'b')), {'x': 1},
                                      method, target)
                self.assertEqual((''.join(key for key, _ in upstream.seen), answered.status),
                                 (tried, status))

    def ask_each(self, failover, *requests):
        """[(keys asked, client's status), ...] of requests (method, target)."""
        told = []
        for method, target in requests:
            self.upstream.seen.clear()
            answered = self.serve(failover, {'x': 1}, method, target)
            told.append((''.join(key for key, _ in self.upstream.seen), answered.status))
        return told

    def test_what_one_key_made_is_found_while_another_key_is_first(self):
        for target in ('/v1/messages/batches/x', '/v1/messages/batches/x/results', '/v1/files/x',
                       '/v1/files/x/content?beta=true', '/v1/skills/x'):
            for method in ('GET', 'HEAD', 'DELETE', 'POST'):
                with self.subTest(method=method, target=target):
                    failover = self.failover(FakeUpstream(a=NOT_HERE, b=NOT_HERE, c=Play()),
                                             make_config('a', 'b', 'c'))
                    # And who knew it is asked first the next time.
                    self.assertEqual(self.ask_each(failover, (method, target), (method, target)),
                                     [('abc', 200), ('c', 200)])
                    self.assertEqual(self.cooling(), {})

    def test_what_no_key_knows_is_told_in_the_upstreams_words(self):
        failover = self.failover(FakeUpstream(a=NOT_HERE, b=NOT_HERE), make_config('a', 'b'))
        answered = self.serve(failover, method='GET', target='/v1/files/x')
        self.assertEqual((answered.status, answered.error['message'], self.record()['outcome']),
                         (404, 'File not found: x', 'refused'))
        for a, b, status in ((BAD_KEY, NOT_HERE, 502), (NOT_HERE, BAD_KEY, 502),
                             (SERVER_TROUBLE, NOT_HERE, 502), (NOT_HERE, RATE_LIMITED, 429)):
            self.setUp()
            failover = self.failover(FakeUpstream(a=a, b=b), make_config('a', 'b'))
            self.assertEqual(self.serve(failover, method='GET', target='/v1/files/x').status,
                             status)    # it may be that key's

    def test_other_paths_are_asked_of_one_key(self):
        failover = self.failover(FakeUpstream(a=NOT_HERE, b=Play()), make_config('a', 'b'))
        paths = [('GET', '/v1/messages/batches'), ('GET', '/v1/files?limit=1'),
                 ('POST', '/v1/files'), ('GET', '/v1/models/x'), ('GET', '/v1/messages/x'),
                 ('POST', '/v1/complete')]
        self.assertEqual(self.ask_each(failover, *paths), [('a', 404)] * len(paths))

    def test_the_key_that_made_something_is_remembered_by_the_answer(self):
        made = b'{"id": "file_1", "type": "file"' + b' ' * 2000 + b', "x": {"id": "file_2"}}'
        for method, target, size in (('POST', '/v1/files', 2),
                                     ('POST', '/v1/messages/batches', 9999),
                                     ('POST', '/v1/skills?beta=true', 7)):
            with self.subTest(target=target):
                self.setUp()
                play = Play()
                play.pieces = pieces(made, size)
                failover = self.failover(FakeUpstream(a=Play(), b=[play, Play()]),
                                         make_config('a', 'b'))
                a, _ = self.store.current.keys.values()
                self.cooldowns.cool(a, cf.Slot(a.ref),
                                    cf.Outcome(rule('window_spent'), 429, 'x', 100), 3600)
                answered = self.serve(failover, {'x': 1}, method, target)
                self.assertEqual((answered.status, answered.body), (200, made))
                self.cooldowns.clear()
                thing = f'{target.partition("?")[0]}/file_1'
                asked = [('GET', thing), ('POST', f'{thing}/cancel'), ('DELETE', thing),
                         ('GET', f'{thing[:-1]}2')]
                self.assertEqual(self.ask_each(failover, *asked), [('b', 200)] * 3 + [('a', 200)])

    def test_a_change_goes_to_the_key_that_made_it_alone_and_a_read_to_others_too(self):
        failover = self.failover(FakeUpstream(a=Play(), b=BAD_KEY), make_config('a', 'b'))
        failover.makers['x'] = 'anthropic:b'
        self.assertEqual(self.ask_each(failover, ('DELETE', '/v1/files/x'),
                                       ('GET', '/v1/files/x')), [('b', 401), ('ba', 200)])
        failover.makers['y'] = 'anthropic:gone'
        self.assertEqual(self.ask_each(failover, ('GET', '/v1/files/y')), [('a', 200)])

    def test_the_latest_things_that_were_made_are_remembered(self):
        makers = {}
        for id in 'abac':
            cf.remember(makers, id, id.upper(), 2)
        self.assertEqual(makers, {'a': 'A', 'c': 'C'})

    def test_the_first_ready_key_is_used_and_a_limited_one_rather_than_none(self):
        upstream = FakeUpstream(a=Play(), b=Play())
        failover = self.failover(upstream, make_config('a', 'b'))
        spent = cf.Outcome(rule('window_spent'), 429, 'x', 100)
        keys = list(self.store.current.keys.values())
        self.cooldowns.cool(keys[0], cf.Slot(keys[0].ref), spent, 3600)
        self.serve(failover, method='GET', target='/v1/models')
        self.cooldowns.cool(keys[1], cf.Slot(keys[1].ref), spent, 3600)
        self.assertEqual(self.serve(failover, method='GET', target='/v1/models').status, 200)
        self.assertEqual([key for key, _ in upstream.seen], ['b', 'a'])

    def test_limits_of_count_tokens_rotate_and_cool_nothing(self):
        upstream = FakeUpstream(a=RATE_LIMITED, b=[Play(), RATE_LIMITED])
        failover = self.failover(upstream, make_config('a', 'b'))
        target = '/v1/messages/count_tokens?beta=true'
        self.assertEqual(self.serve(failover, target=target).status, 200)
        answered = self.serve(failover, target=target)
        self.assertEqual((answered.status, answered.json),
                         (429, api_error('rate_limit_error', 'slow down')))
        self.assertEqual(self.cooling(), {})
        self.assertEqual({model for _, model in upstream.seen}, {OPUS})

    def test_a_complaint_about_thinking_on_another_path_is_relayed(self):
        complaint = refusal(400, 'invalid_request_error',
                            'messages.1.content.0: Invalid `signature` in `thinking` block')
        answered = self.serve(self.failover(FakeUpstream(a=complaint), make_config('a')),
                              target='/v1/messages/count_tokens')
        self.assertEqual((answered.status, len(self.upstream.seen)), (400, 1))

    def test_a_limit_whose_body_is_cut_is_a_limit_all_the_same(self):
        cut = refusal(429, 'rate_limit_error', 'x', retry_after='50')
        cut.pieces = [b'{"type', cf.UpstreamCut('it closed')]
        _, seen = self.one({'a': cut, 'b': Play()})
        self.assertEqual((seen, self.cooling()), (['a', 'b'], {('a', OPUS): 50}))

    def test_without_a_model_no_key_rests_for_every_model(self):
        upstream = FakeUpstream(a=OVERLOADED)
        self.serve(self.failover(upstream, make_config('a', queueWaitMs=0)), {'max_tokens': 1})
        self.assertEqual(self.cooling(), {})

    def test_an_error_of_our_own_is_recorded_too(self):
        upstream = FakeUpstream(a=ZeroDivisionError())
        with self.assertRaises(ZeroDivisionError):
            self.serve(self.failover(upstream, make_config('a')))
        self.assertEqual(self.record()['outcome'], 'failed')

    def test_a_compressed_error_is_classified_and_readable(self):
        for encoding, data in compressed(json.dumps(
                api_error('invalid_request_error', 'Your credit balance is too low')).encode()):
            for size in (1, 7, len(data)):
                with self.subTest(encoding=encoding, size=size):
                    self.setUp()
                    play = Play(400, {'content-encoding': encoding}, stream=pieces(data, size))
                    answered, seen = self.one({'a': play}, 'a')
                    self.assertEqual((seen, self.cooling(), answered.status),
                                     (['a'], {('a', None): 3600}, 400))
                    self.assertIn('credit balance', answered.error['message'])
                    self.assertNotIn('content-encoding', answered.headers)

    def test_a_compressed_stream_is_read_event_by_event(self):
        error = stream_bytes([OVERLOADED_EVENT])
        for encoding, data in compressed(stream_bytes()):
            for size in (1, 7, len(data)):
                with self.subTest(encoding=encoding, size=size):
                    self.setUp()
                    play = Play(200, {'content-encoding': encoding}, stream=pieces(data, size))
                    answered, _ = self.one({'a': play}, 'a', messages_body(stream=True))
                    self.assertEqual((answered.body, answered.is_complete), (stream_bytes(), True))
                    self.assertNotIn('content-encoding', answered.headers)
                    self.assertEqual(self.record()['output_tokens'], 5)
        for (encoding, data), (_, cut) in zip(compressed(error),
                                              compressed(stream_bytes(stream_events()[:4]))):
            self.setUp()
            answered, seen = self.one({'a': Play(200, {'content-encoding': encoding}, stream=data),
                                       'b': Play(stream=stream_bytes())},
                                      body=messages_body(stream=True))
            self.assertEqual((answered.body, seen, self.cooling()),
                             (stream_bytes(), ['a', 'b'], {('a', OPUS): 10}))
            self.setUp()
            answered, _ = self.one({'a': Play(200, {'content-encoding': encoding}, stream=cut)},
                                   'a', messages_body(stream=True))
            self.assertEqual((answered.events[-1]['type'], self.record()['outcome']),
                             ('error', 'failed'))

    def test_a_compressed_answer_of_openais_is_translated(self):
        for encoding, data in compressed(chat_stream({'content': 'hello'})):
            play = Play(200, {'content-encoding': encoding}, stream=pieces(data, 50))
            answered, _ = self.openai_one({'oa': play}, keys='', body=messages_body(stream=True))
            self.assertEqual(answered.events[-1]['type'], 'message_stop')
        for encoding, data in compressed(json.dumps(CHAT_HELLO).encode()):
            answered, _ = self.openai_one({'oa': Play(200, {'content-encoding': encoding}, data)},
                                          keys='')
            self.assertEqual(answered.json['content'][0]['text'], 'hello')
        for encoding, data in compressed(
                b'{"error":{"message":"x","code":"rate_limit_exceeded"}}'):
            self.cooldowns.clear()
            answered, _ = self.openai_one({'oa': Play(429, {'content-encoding': encoding}, data)},
                                          keys='')
            self.assertEqual((answered.status, self.record()['attempts'][0]['result']),
                             (429, 'rate_limited'))

    def test_a_plain_compressed_answer_comes_decoded_and_counted(self):
        for encoding, data in compressed(json.dumps(MESSAGE).encode()):
            self.setUp()
            answered, _ = self.one({'a': Play(200, {'content-encoding': encoding}, data)}, 'a')
            self.assertEqual((answered.json, answered.is_complete, self.record()['output_tokens']),
                             (MESSAGE, True, 5))
            self.assertNotIn('content-encoding', answered.headers)

    def test_what_needs_not_be_read_or_cannot_be_passes_as_it_came(self):
        data = gzip.compress(b'{"data":[]}')
        failover = self.failover(FakeUpstream(a=Play(200, {'content-encoding': 'gzip'}, data)),
                                 make_config('a'))
        answered = self.serve(failover, method='GET', target='/v1/models')
        self.assertEqual((answered.body, answered.headers['content-encoding']), (data, 'gzip'))
        for status, coding in ((200, 'br'), (200, 'zstd'), (400, 'br'), (200, 'gzip, br'),
                               (200, 'gzip,' * 20 + 'gzip')):
            play = Play(status, {'content-encoding': coding}, stream=[b'\x8b\x02', b'raw'])
            answered, _ = self.one({'a': play}, 'a', messages_body(stream=True))
            self.assertEqual((answered.status, answered.body,
                              answered.headers['content-encoding']),
                             (status, b'\x8b\x02raw', coding))

    def test_a_compressed_body_that_swells_is_read_in_small_pieces(self):
        bomb = gzip.compress(b' ' * 60_000_000, 9)
        sizes = []
        upstream = cf.decoded(FakeUpstreamResponse(Play(200, {'content-encoding': 'gzip'}, bomb)))
        while sum(sizes) < 60_000_000:
            sizes.append(len(upstream.read()))
        self.assertEqual((upstream.read(), max(sizes) <= cf.DECODED_BYTES), (b'', True))
        play = Play(400, {'content-encoding': 'gzip'}, bomb)
        self.assertLess(len(self.one({'a': play}, 'a')[0].body),
                        cf.MAX_ERROR_BODY_BYTES + cf.DECODED_BYTES)

    def test_a_compressed_body_that_is_broken_or_not_whole_is_a_cut(self):
        data = gzip.compress(stream_bytes())
        for broken in (data[:-9], data[:1], data[:60] + b'x' * 100, data[:-8] + b'12345678'):
            upstream = cf.decoded(
                FakeUpstreamResponse(Play(200, {'content-encoding': 'gzip'}, broken)))
            with self.assertRaises(cf.UpstreamCut):
                upstream.read_all(1 << 20)
        for whole in (data, data + b'\0' * 9, data + b'\0', b''):
            upstream = cf.decoded(
                FakeUpstreamResponse(Play(200, {'content-encoding': 'GZIP'}, whole)))
            self.assertEqual(upstream.read_all(1 << 20), stream_bytes() if whole else b'')

    def test_waiting_for_a_compressed_body_waits_for_what_it_says(self):
        data = gzip.compress(stream_bytes())
        upstream = cf.decoded(FakeUpstreamResponse(Play(200, {'content-encoding': 'gzip'},
                                                        stream=[data[:10], SILENCE, data[10:]])))
        self.assertFalse(upstream.wait(1))        # its head says nothing yet
        self.assertTrue(upstream.wait(1))
        self.assertEqual(upstream.read(), stream_bytes())

    def test_a_plain_answer_that_is_cut_is_the_next_keys_turn_or_has_no_end(self):
        long = json.dumps({**MESSAGE,
                           'content': [{'type': 'text', 'text': 'x' * cf.HELD_BYTES}]}).encode()
        for begun, seen in ((b'{"half":', ['a', 'b']), (long[:-9], ['a'])):
            self.setUp()
            play = Play()
            play.pieces = [begun, cf.UpstreamCut('cut')]
            answered, tried = self.one({'a': play, 'b': Play()})
            self.assertEqual((tried, answered.is_complete, self.record()['outcome'] == 'failed'),
                             (seen, len(seen) > 1, len(seen) == 1))

    STREAM_TYPES = ('text/event-stream', 'text/event-stream; charset=utf-8', 'Text/Event-Stream',
                    'text/plain', 'application/octet-stream', 'application/json', '', None)

    def typed(self, type, stream):
        """A streamed answer with this content type, or without one."""
        play = Play(stream=stream)
        play.headers = {'content-type': type} if type is not None else {}
        return play

    def test_a_stream_is_known_by_its_content(self):
        opening_error = stream_bytes([*stream_events()[:1], OVERLOADED_EVENT])
        body = messages_body(stream=True)
        for type in self.STREAM_TYPES:
            for size in (1, 5, 1000):
                with self.subTest(type=type, size=size):
                    self.setUp()
                    answered, seen = self.one(
                        {'a': self.typed(type, pieces(opening_error, size)),
                         'b': self.typed(type, pieces(stream_bytes(), size))}, body=body)
                    self.assertEqual((answered.body, seen, self.cooling()),
                                     (stream_bytes(), ['a', 'b'], {('a', OPUS): 10}))
                    self.setUp()
                    cut = stream_bytes(stream_events()[:4])
                    answered, _ = self.one({'a': self.typed(type, pieces(cut, size))}, 'a',
                                           body=body)
                    self.assertEqual((answered.events[-1]['type'], self.record()['outcome']),
                                     ('error', 'failed'))
        self.setUp()
        for start in (b'\xef\xbb\xbf', b'\n\n', b': hello\n\n', b'retry: 5\n\n'):
            answered, _ = self.one({'a': self.typed(None, start + stream_bytes())}, 'a', body=body)
            self.assertEqual((answered.body, answered.is_complete), (start + stream_bytes(), True))

    def test_a_stream_of_openais_is_known_by_its_content(self):
        for type in self.STREAM_TYPES:
            for stream in (True, False):
                self.cooldowns.clear()
                limited = b'data: {"error":{"code":"rate_limit_exceeded","message":"x"}}\n\n'
                answered, seen = self.openai_one(
                    {'oa': self.typed(type, limited),
                     'ob': self.typed(type, pieces(chat_stream({'content': 'hello'}), 9))},
                    keys='', openai=('oa', 'ob'), body=messages_body(stream=stream))
                self.assertEqual((answered.status, len(seen), self.cooling()),
                                 (200, 2, {('oa', 'gpt-5.4'): 30}))
                if stream:
                    self.assertEqual(answered.events[-1]['type'], 'message_stop')
                else:
                    self.assertEqual(answered.json['content'][0]['text'], 'hello')

    def test_the_wish_for_a_stream_is_seen_wherever_it_stands(self):
        far = [{'role': 'user', 'content': 'x' * 3000}]
        body = {'model': OPUS, 'messages': far, 'stream': True, 'system': 'x' * 3000,
                'max_tokens': 1}
        answered, seen = self.one({'a': self.typed(None, stream_bytes([OVERLOADED_EVENT])),
                                   'b': self.typed(None, stream_bytes())}, body=body)
        self.assertEqual((answered.body, seen), (stream_bytes(), ['a', 'b']))

    def test_an_error_event_of_any_shape_opens_no_answer(self):
        for data, status in (
                (b'event: error\ndata: {"type":"error","error":"text"}\n\n', 500),
                (b'data: {"error":{"message":"x"}}\n\n', 500),
                (b'event: error\ndata: it broke\n\n', 500),
                (b'event:error\r\ndata: {"type":"rate_limit_error","message":"x"}\r\n\r\n', 429),
                (b'data: {"error":{"code":429,"message":"x"}}\n\n', 429),
                (b'data: {"error":{"type":"rate_limit_exceeded"}}\n\n', 429),
                (b'data: {"type":"error","error":{"type":"overloaded_error","code":"x"}}\n\n',
                 529), (b'data: {"type":"error","error":{"type":["x"]}}', 500)):
            with self.subTest(data=data):
                self.setUp()
                answered, seen = self.one({'a': Play(stream=data),
                                           'b': Play(stream=stream_bytes())},
                                          body=messages_body(stream=True))
                self.assertEqual((answered.body, seen[-1], self.record()['attempts'][0]['status']),
                                 (stream_bytes(), 'b', status))

    def test_a_200_that_is_no_message_is_the_next_keys_turn(self):
        page = b'<!DOCTYPE html><html><body>Sign in</body></html>'
        for body in (b'', b' \n', page, page * 2000, b'OK', b'{}', b'[]', b'null', b'"x"',
                     b'{"detail":"no"}', b'{"code":500,"msg":"busy"}',
                     b'{"id":"msg_1","content":[',
                     b'{"choices":[{"message":{"content":"hello"}}]}'):
            for stream in (False, True):
                for fields in ({}, {'content-type': 'text/html'},
                               {'content-type': 'text/event-stream'}):
                    with self.subTest(body=body[:30], stream=stream, fields=fields):
                        self.setUp()
                        good = Play(stream=stream_bytes()) if stream else Play()
                        answered, seen = self.one({'a': Play(200, fields, body), 'b': good},
                                                  body=messages_body(stream=stream))
                        self.assertEqual((seen, self.cooling(), answered.status),
                                         (['a', 'b'], {}, 200))
                        self.assertEqual((answered.events if stream else answered.json),
                                         stream_events() if stream else MESSAGE)
                        self.assertEqual((answered.headers['x-proxy-attempts'],
                                          self.record()['outcome']),
                                         ('a=no_message,b=200', 'answered'))

    def test_three_that_are_no_message_in_a_row_rest_the_pair_and_give_up_the_model(self):
        upstream = FakeUpstream(**{key: Play(200, body=b'<html>secret-of-mine</html>')
                                   for key in 'abcd'})
        answered = self.serve(self.failover(upstream,
                                            make_config('a', 'b', 'c', 'd', queueWaitMs=0)),
                              fields=[('x-api-key', 'secret-of-mine')])
        self.assertEqual([model for _, model in upstream.seen], [OPUS] * 3 + [SONNET] * 3)
        self.assertEqual((answered.status, answered.error['type'], self.cooling()),
                         (502, 'api_error', {}))
        self.assertIn('no_message, "no message was sent, but ...', answered.error['message'])
        self.assertNotIn('secret-of-mine', answered.error['message'])
        for _ in range(3):
            self.one({'a': Play(200, body=b'')}, 'a')
        self.assertEqual(self.cooling(), {('a', OPUS): 15})

    def test_an_error_in_a_200_means_what_it_says(self):
        for error, tried, cooled, status in (
                (api_error('rate_limit_error', 'x'), 'ab', {('a', OPUS): 30}, 200),
                (api_error('overloaded_error', 'x'), 'ab', {('a', OPUS): 10}, 200),
                (api_error('authentication_error', 'x'), 'ab', {('a', None): 300}, 200),
                (api_error('billing_error', 'x'), 'ab', {('a', None): 3600}, 200),
                (api_error('invalid_request_error', 'prompt is too long'), 'a', {}, 400),
                (api_error('api_error', 'x'), 'aab', {}, 200),
                ({'error': {'type': 'overloaded_error', 'message': 'x'}}, 'ab', {('a', OPUS): 10},
                 200), ({'error': 'busy'}, 'aab', {}, 200),
                ({'error': {'code': 429, 'message': 'x'}}, 'ab', {('a', OPUS): 30}, 200),
                ({'type': 'error', 'message': 'x'}, 'aab', {}, 200),
                ({**MESSAGE, 'error': None}, 'a', {}, 200)):
            for stream in (False, True):
                for type in ('application/json', 'text/event-stream', 'text/plain'):
                    with self.subTest(error=error, stream=stream, type=type):
                        self.setUp()
                        play = Play(200, {'content-type': type}, error)
                        answered, seen = self.one(
                            {'a': play, 'b': Play(stream=stream_bytes()) if stream else Play()},
                            body=messages_body(stream=stream))
                        self.assertEqual((''.join(seen), self.cooling(), answered.status),
                                         (tried, cooled, status))
                        if status == 400:
                            self.assertEqual((answered.json, answered.headers['content-type']),
                                             (error, 'application/json'))

    def test_only_the_beginning_of_a_plain_answer_is_held(self):
        long = json.dumps({**MESSAGE,
                           'content': [{'type': 'text', 'text': 'x' * 300_000}]}).encode()
        connection, sent = FakeConnection(), []

        class Watching(FakeUpstreamResponse):
            def read(self):
                sent.append(len(connection.data))
                return super().read()
        play = Play()
        play.pieces = pieces(long, 10_000)
        upstream = FakeUpstream(a=play)
        upstream.open = lambda *args: Watching(play)
        head = make_head('POST', cf.MESSAGES_PATH)
        request = cf.ClientRequest(head, json.dumps(messages_body()).encode(), 'default')
        cf.Serving(self.failover(upstream, make_config('a')), request,
                   cf.ClientResponse(connection, head), cf.Exchange(None, self.clock)).serve()
        self.assertEqual((sent.count(0), Answered(connection.data).body),
                         (cf.HELD_BYTES // 10_000 + 1, long))

    def test_a_message_whose_text_speaks_of_errors_goes_through_untouched(self):
        for body in (json.dumps(
                {**MESSAGE, 'content': [{'type': 'text', 'text': '{"type":"error","error":{}}'}]},
                indent=3).encode(), b'\n ' + json.dumps({**MESSAGE, 'error': {}, 'content': [
                    {'type': 'tool_use', 'input': {'error': 'x', 'type': 'error'}}]}).encode(),
                     b'{"content": []}', b'{"type":"message","content":"text"}'):
            answered, _ = self.one({'a': Play(200, body=body)}, 'a')
            self.assertEqual((answered.status, answered.body), (200, body))

    FOLDED = [
        {'type': 'message_start', 'message': {**MESSAGE, 'content': [], 'stop_reason': None,
                                              'usage': {'input_tokens': 10, 'output_tokens': 1}}},
        {'type': 'content_block_start', 'index': 0,
         'content_block': {'type': 'thinking', 'thinking': '', 'signature': ''}},
        {'type': 'content_block_delta', 'index': 0,
         'delta': {'type': 'thinking_delta', 'thinking': 'h'}},
        {'type': 'content_block_delta', 'index': 0,
         'delta': {'type': 'thinking_delta', 'thinking': 'm'}},
        {'type': 'content_block_delta', 'index': 0,
         'delta': {'type': 'signature_delta', 'signature': 'sig'}},
        {'type': 'content_block_stop', 'index': 0},
        {'type': 'content_block_start', 'index': 1,
         'content_block': {'type': 'redacted_thinking', 'data': 'x'}},
        {'type': 'content_block_stop', 'index': 1},
        {'type': 'content_block_start', 'index': 2, 'content_block': {'type': 'text', 'text': ''}},
        {'type': 'content_block_delta', 'index': 2,
         'delta': {'type': 'text_delta', 'text': 'hel'}},
        {'type': 'ping'},
        {'type': 'content_block_delta', 'index': 2,
         'delta': {'type': 'citations_delta', 'citation': {'cited_text': 'c'}}},
        {'type': 'content_block_delta', 'index': 2, 'delta': {'type': 'text_delta', 'text': 'lo'}},
        {'type': 'content_block_stop', 'index': 2},
        {'type': 'content_block_start', 'index': 3, 'content_block': {
            'type': 'server_tool_use', 'id': 's', 'name': 'web_search', 'input': {}}},
        {'type': 'content_block_delta', 'index': 3,
         'delta': {'type': 'input_json_delta', 'partial_json': '{"query"'}},
        {'type': 'content_block_delta', 'index': 3,
         'delta': {'type': 'input_json_delta', 'partial_json': ': "q"}'}},
        {'type': 'content_block_stop', 'index': 3},
        {'type': 'message_delta', 'delta': {'stop_reason': 'tool_use', 'stop_sequence': None},
         'usage': {'output_tokens': 5}, 'context_management': {'applied_edits': []}},
        {'type': 'message_stop'}]
    FOLD = {**MESSAGE, 'stop_reason': 'tool_use', 'stop_sequence': None,
            'context_management': {'applied_edits': []},
            'content': [{'type': 'thinking', 'thinking': 'hm', 'signature': 'sig'},
                        {'type': 'redacted_thinking', 'data': 'x'},
                        {'type': 'text', 'text': 'hello', 'citations': [{'cited_text': 'c'}]},
                        {'type': 'server_tool_use', 'id': 's', 'name': 'web_search',
                         'input': {'query': 'q'}}]}

    def test_a_stream_that_answers_a_plain_request_is_folded_into_one_message(self):
        for type in self.STREAM_TYPES:
            for data in (stream_bytes(self.FOLDED), stream_bytes(self.FOLDED, b'\r\n'),
                         stream_bytes(self.FOLDED)[:-2], stream_bytes(self.FOLDED[:-1])):
                for size in (1, 50, len(data)):
                    answered, _ = self.one({'a': self.typed(type, pieces(data, size))}, 'a')
                    self.assertEqual((answered.status, answered.json,
                                      answered.headers['content-type']),
                                     (200, self.FOLD, 'application/json'))
        self.assertEqual((self.record()['output_tokens'], self.record()['input_tokens']), (5, 10))

    def test_a_folded_stream_that_fails_or_is_cut_is_a_failed_attempt(self):
        data, body = stream_bytes(self.FOLDED), stream_bytes([*self.FOLDED[:12], OVERLOADED_EVENT])
        for play, result in ((Play(stream=body), 'overloaded'),
                             (Play(stream=[data[:900], cf.UpstreamCut('x')]), 'reset'),
                             (Play(stream=data[:900]), 'reset'),
                             (Play(stream=b': x\n\n'), 'no_message')):
            self.setUp()
            answered, seen = self.one({'a': play, 'b': Play()})
            self.assertEqual((answered.json, seen, self.record()['attempts'][0]['result']),
                             (MESSAGE, ['a', 'b'], result))
        with mock.patch.object(cf, 'MAX_BODY_BYTES', 500):
            self.assertEqual(self.one({'a': Play(stream=[data[:400], data[400:900], data[900:]])},
                                      'a')[0].status, 502)

    def test_a_message_adds_up_to_its_events_and_back(self):
        events = cf.events_from_message(self.FOLD)
        folded = cf.message_from_events(events)
        self.assertEqual({**folded, 'content': folded['content']}, self.FOLD)
        self.assertEqual([event['type'] for event in events if event['type'].startswith(
            'message')], ['message_start', 'message_delta', 'message_stop'])

    # -- the queue

    def test_a_request_waits_for_the_nearest_return_within_its_time(self):
        upstream = FakeUpstream(a=[RATE_LIMITED, Play()],
                                b=refusal(429, 'rate_limit_error', 'x', retry_after='50'))
        answered = self.serve(self.failover(upstream, make_config('a', 'b', modelFallback={})))
        self.assertEqual((answered.status, self.clock.now - 1000), (200, 20))
        self.assertEqual([key for key, _ in upstream.seen], ['a', 'b', 'a'])
        self.assertEqual((answered.headers['x-proxy-queued'], self.record()['queued_ms']),
                         ('20', 20000))
        self.assertEqual(self.cooldowns.queue_length(), 0)

    def test_a_return_that_is_too_far_is_answered_at_once(self):
        ticks = iter(range(1_000_000))
        tick = self.clock.__class__.__call__
        with mock.patch.object(FakeClock, '__call__',
                               lambda clock: tick(clock) + next(ticks) * 1e-7):
            answered, _ = self.one({'a': LONG}, 'a', queueWaitMs=90000)
        self.assertNotIn('x-proxy-queued', answered.headers)
        for changes in ({'queueWaitMs': 19000}, {'queueWaitMs': 0}):
            self.setUp()
            answered, seen = self.one({'a': RATE_LIMITED}, 'a', **changes)
            self.assertEqual((answered.status, self.clock.now, seen), (429, 1000, ['a']))

    def test_waiting_twice_does_not_double_the_time(self):
        upstream = FakeUpstream(a=RATE_LIMITED)
        answered = self.serve(
            self.failover(upstream, make_config('a', queueWaitMs=50_000, modelFallback={})))
        self.assertEqual((answered.status, self.clock.now - 1000, len(upstream.seen)),
                         (429, 40, 3))

    def test_nobody_waits_for_billing_or_a_login(self):
        for play in (NO_CREDIT, BAD_KEY, NO_MODEL):
            self.setUp()
            for _ in range(2):
                self.one({'a': play}, 'a', queueWaitMs=3_600_000)
            self.assertEqual(self.clock.now, 1000)

    def test_a_held_stream_is_kept_alive_by_pings(self):
        upstream = FakeUpstream(a=[refusal(429, 'rate_limit_error', 'x', retry_after='35'),
                                   Play(stream=stream_bytes())])
        answered = self.serve(self.failover(upstream, make_config('a', modelFallback={})),
                              messages_body(stream=True))
        self.assertEqual((answered.status, answered.headers['content-type']),
                         (200, 'text/event-stream; charset=utf-8'))
        self.assertEqual(answered.events, [{'type': 'ping'}] * 3 + stream_events())
        self.assertTrue(answered.is_complete)

    def test_a_held_stream_is_told_of_its_failure_by_an_event(self):
        upstream = FakeUpstream(a=[refusal(429, 'rate_limit_error', 'x', retry_after='35'), LONG])
        answered = self.serve(self.failover(upstream, make_config('a', modelFallback={})),
                              messages_body(stream=True))
        self.assertEqual([event['type'] for event in answered.events], ['ping'] * 3 + ['error'])
        self.assertEqual(answered.events[-1]['error']['type'], 'rate_limit_error')

    def test_a_held_plain_request_just_waits(self):
        upstream = FakeUpstream(a=[refusal(429, 'rate_limit_error', 'x', retry_after='35'),
                                   Play()])
        answered = self.serve(self.failover(upstream, make_config('a', modelFallback={})))
        self.assertEqual((answered.status, answered.json), (200, MESSAGE))

    def test_a_new_configuration_clearing_and_leaving_end_the_wait(self):
        for event, status in (('config', 200), ('clear', 200), ('shutdown', 429), ('leave', None)):
            with self.subTest(event=event):
                self.setUp()
                upstream = FakeUpstream(a=[RATE_LIMITED, Play()], b=Play())
                failover = self.failover(upstream, make_config('a', modelFallback={}))
                exchange = cf.Exchange(None, self.clock)

                def act(seconds):
                    {'config': lambda: setattr(self.store, 'current', make_config('a', 'b')),
                     'clear': self.cooldowns.clear, 'leave': exchange.client_left,
                     'shutdown': lambda: setattr(failover, 'stopping', True)}[event]()
                    self.cooldowns.wake_all()
                    self.clock.now -= seconds
                self.clock.on_wait = act
                if status is None:
                    with self.assertRaises(IndexError):       # nothing was written
                        self.serve(failover, exchange=exchange)
                    self.assertEqual(self.record()['outcome'], 'client_gone')
                else:
                    self.assertEqual(self.serve(failover, exchange=exchange).status, status)
                self.assertEqual((self.clock.now, self.cooldowns.queue_length()), (1000, 0))

    def test_a_returning_key_meets_one_request_and_then_the_others(self):
        """Ten requests wait for one key; the second goes only when the first has its headers."""
        arrived, release = queue.Queue(), threading.Semaphore(0)

        class Gate(FakeUpstream):
            def open(self, *args):
                arrived.put(threading.current_thread().name)
                release.acquire(timeout=PATIENCE_S)
                return super().open(*args)
        failover = self.failover(Gate(a=Play()), make_config('a', modelFallback={}))
        failover.wait = threading.Event.wait
        key = self.store.current.keys['anthropic:a']
        slot = cf.Slot(key.ref, OPUS)
        self.cooldowns.cool(key, slot, cf.Outcome(rule('rate_limited'), 429, 'x', 50), 3600)
        threads = [threading.Thread(target=self.serve, args=(failover,), daemon=True)
                   for _ in range(10)]
        joined = threading.Semaphore(0)
        await_slots = self.cooldowns.await_slots
        self.cooldowns.await_slots = lambda *args: (await_slots(*args), joined.release())
        for thread in threads:
            thread.start()
        for _ in threads:
            self.assertTrue(joined.acquire(timeout=PATIENCE_S))
        self.clock.now += 50
        self.cooldowns.wake_all()
        arrived.get(timeout=PATIENCE_S)
        self.assertEqual(self.cooldowns.queue_length(), 10)
        self.assertTrue(arrived.empty())
        release.release()
        for _ in range(9):
            arrived.get(timeout=PATIENCE_S)
            release.release()
        for thread in threads:
            thread.join(PATIENCE_S)
        self.assertEqual(self.metrics.snapshot()[0]['answered'], 10)

    def test_a_configuration_without_what_was_waited_for_is_no_busy_loop(self):
        upstream = FakeUpstream(a=RATE_LIMITED, c=LONG)
        failover = self.failover(upstream, make_config('a', modelFallback={}))
        waits = []

        def change(seconds):
            waits.append(seconds)
            self.assertLess(len(waits), 20)
            self.store.current = make_config('c', modelFallback={})
            self.cooldowns.wake_all()
            self.clock.now += 1 - seconds
        self.clock.on_wait = change
        self.assertEqual(self.serve(failover).status, 429)
        self.assertEqual([key for key, _ in upstream.seen], ['a', 'c'])

    def test_a_key_that_comes_back_while_another_is_tried_is_used(self):
        def slowly(body):
            self.clock.now += 2
            return LONG
        upstream = FakeUpstream(a=[refusal(429, 'rate_limit_error', 'x', retry_after='1'), Play()],
                                b=[slowly, slowly])
        answered = self.serve(self.failover(upstream, make_config('a', 'b', modelFallback={})))
        self.assertEqual((answered.status, [key for key, _ in upstream.seen]),
                         (200, ['a', 'b', 'a']))

    def test_a_key_that_is_added_while_the_first_is_tried_is_used(self):
        def meanwhile(body):
            self.store.current = make_config('a', 'b', modelFallback={})
            return RATE_LIMITED
        upstream = FakeUpstream(a=[meanwhile, meanwhile], b=Play())
        answered = self.serve(self.failover(upstream, make_config('a', modelFallback={})))
        self.assertEqual((answered.headers['x-proxy-key'], self.clock.now), ('b', 1000))

    def test_a_refusal_of_a_token_that_was_replaced_does_not_rest_the_new_one(self):
        fresh = make_document('a')
        fresh['keys']['a']['token'] = token_of('fresh')

        def meanwhile(body):
            self.store.current = cf.parse_config(fresh)
            return BAD_KEY
        self.serve(self.failover(FakeUpstream(a=[meanwhile, meanwhile]), make_config('a')))
        self.assertEqual(self.cooling(), {})

    def test_tiny_hints_make_no_busy_loop_and_a_held_stream_hears_of_it(self):
        upstream = FakeUpstream(a=refusal(429, 'rate_limit_error', 'x', retry_after='0.01'))
        answered = self.serve(self.failover(upstream, make_config('a', modelFallback={})),
                              messages_body(stream=True))
        self.assertLess(len(upstream.seen), 100)
        self.assertEqual({event['type'] for event in answered.events[:8]}, {'ping'})
        self.assertEqual(answered.events[-1]['type'], 'error')

    def test_a_pause_is_not_shortened_by_news_of_the_queue(self):
        def wake(seconds):
            self.clock.now += 0.1 - seconds
        self.clock.on_wait = wake
        self.one({'a': [SERVER_TROUBLE, Play()]}, 'a')
        self.assertAlmostEqual(self.clock.now, 1000.5, places=6)

    # -- the final failure

    def test_the_final_failure_names_all_that_was_tried_and_when_to_come_back(self):
        answered, _ = self.one({'a': RATE_LIMITED, 'b': LONG})
        self.assertEqual((answered.status, answered.error['type']), (429, 'rate_limit_error'))
        message = answered.error['message']
        for words in (f'a with {OPUS} (back in 20 s), b with {OPUS} (back in 50 min): 429 '
                      'rate_limited, "slow down".', 'Earliest back: a in 20 s'):
            self.assertIn(words, message)
        self.assertEqual(answered.headers['retry-after'], '20')
        self.assertNotIn('x-should-retry', answered.headers)
        self.assertTrue(answered.headers['request-id'].startswith('req_'))
        self.assertEqual(answered.headers['x-proxy-attempts'], 'a=429,b=429')

    def test_what_waiting_cannot_mend_says_so(self):
        for plays, status, retry_after, should_retry in (
                ((LONG, LONG), 429, '3000', 'false'), ((RATE_LIMITED, BAD_KEY), 429, '20', None),
                ((BAD_KEY, BAD_KEY), 502, None, 'false'),
                ((FORBIDDEN, BAD_KEY), 502, None, 'false'),
                ((NO_CREDIT, NO_CREDIT), 400, None, 'false'),
                ((NO_MODEL, NO_MODEL), 404, None, 'false'),
                ((SERVER_TROUBLE, SERVER_TROUBLE), 502, None, None),
                ((OVERLOADED, OVERLOADED), 529, '10', None),
                ((LONG, SERVER_TROUBLE), 429, '1', None),
                ((NO_MODEL, SERVER_TROUBLE), 502, None, None)):
            with self.subTest(status=status, plays=[play.pieces for play in plays]):
                self.setUp()
                answered, _ = self.one({'a': plays[0], 'b': plays[1]})
                self.assertEqual(
                    (answered.status, answered.headers.get('retry-after'),
                     answered.headers.get('x-should-retry')),
                    (status, retry_after, should_retry))

    def test_a_hint_of_nothing_is_told_as_a_second(self):
        answered, _ = self.one({'a': refusal(429, 'rate_limit_error', 'x', retry_after='0')}, 'a')
        self.assertEqual((answered.headers['retry-after'], answered.headers.get('x-should-retry')),
                         ('1', None))

    def test_keys_that_rest_are_named_with_what_they_said_last(self):
        for play, status, words in ((BAD_KEY, 401, 'invalid API key'),
                                    (NO_CREDIT, 400, 'credit balance'), (NO_MODEL, 404, OPUS),
                                    (FORBIDDEN, 502, 'not for you'), (LONG, 429, 'slow down')):
            self.setUp()
            for _ in range(2):
                answered, _ = self.one({'a': play}, 'a')
            self.assertEqual(answered.status, status)
            self.assertIn(words, answered.error['message'])
            self.assertNotIn('x-api-key', answered.error['message'])    # Claude Code would log in
            self.assertEqual('back in' in answered.error['message'], play is LONG)

    def test_what_is_refused_on_the_way_is_neither_waited_for_nor_asked_twice(self):
        for play in (refusal(403, 'forbidden', 'Request not allowed'),
                     Play(403, body=b'<html>no'), BAD_KEY):
            self.setUp()
            began = self.clock.now
            _, seen = self.one({'a': play}, 'a', queueWaitMs=60_000, modelFallback={OPUS: SONNET})
            tries = [len(seen), *(len(self.again()[1]) for _ in range(3))]
            self.assertLessEqual(max(tries), 2 if play is not BAD_KEY else 1, tries)
            self.assertLess(self.clock.now - began, 5)

    def test_a_final_429_carries_the_upstreams_limit_fields(self):
        play = refusal(429, 'rate_limit_error', 'x',
                       anthropic_ratelimit_unified_5h_status='rejected',
                       anthropic_ratelimit_unified_5h_reset=str(int(START) + 30))
        answered, _ = self.one({'a': play}, 'a')
        self.assertEqual(answered.headers['anthropic-ratelimit-unified-5h-status'], 'rejected')

    def test_no_token_is_ever_told(self):
        echo = refusal(401, 'authentication_error', f'Incorrect API key provided: {token_of("a")}')
        for plays in ((BAD_KEY, BAD_KEY), (LONG, LONG), (Play(), Play()), (echo, echo),
                      (FORBIDDEN, echo)):
            self.setUp()
            answered, _ = self.one({'a': plays[0], 'b': plays[1]})
            told = repr(answered.fields) + repr(answered.body) + repr(self.log.mock_calls) + repr(
                self.record())
            self.assertNotIn('0123456789abcdef', told)

    def test_a_token_of_any_shape_is_hidden_where_an_upstream_quotes_it(self):
        document = make_document('a', queueWaitMs=0)
        document['keys']['a'].update(token='local-Secret-0123456789', baseUrl='http://localhost:1')
        echo = refusal(403, 'permission_error', 'no: local-Secret-0123456789')
        answered = self.serve(self.failover(FakeUpstream(client=echo), cf.parse_config(document)))
        self.assertEqual(answered.status, 502)
        self.assertNotIn('Secret', answered.error['message'] + json.dumps(self.record()) + repr(
            self.log.mock_calls))

    def test_a_credential_that_is_a_mere_word_is_no_secret_where_a_text_holds_it(self):
        told = 'the tool none is not allowed'
        refused = refusal(403, 'permission_error', told)
        event = stream_bytes([*stream_events()[:4],
                              {'type': 'error', 'error': {'type': 'api_error', 'message': told}}])
        for word in ('none', 'a', 'tool', 'allowed'):
            for play, stream in ((refused, False), (Play(stream=event), True)):
                self.setUp()
                failover = self.failover(FakeUpstream(a=play), make_config('a', queueWaitMs=0))
                answered = self.serve(failover, messages_body(stream=stream),
                                      fields=[('x-api-key', word)])
                self.assertIn(told, answered.body.decode())
                self.assertIn(told, self.record()['error'])

    def openai_one(self, script, keys='a', openai=('oa',), body=None, **changes):
        """One request over Claude keys and OpenAI keys; (Answered, [(key id, model), ...])."""
        changes.setdefault('queueWaitMs', 0)
        changes.setdefault('modelFallback', {})
        config = make_config(*keys, **with_openai(*openai, **changes))
        answered = self.serve(self.failover(FakeUpstream(**script), config), body)
        return answered, self.upstream.seen

    def test_openai_answers_when_claude_is_exhausted_and_the_client_sees_claude(self):
        answered, seen = self.openai_one({'a': RATE_LIMITED, 'oa': Play(body=CHAT_HELLO)})
        self.assertEqual(seen, [('a', OPUS), ('oa', 'gpt-5.4')])
        self.assertEqual({k: v for k, v in answered.json.items() if k != 'id'},
                         {'type': 'message', 'role': 'assistant', 'model': OPUS,
                          'content': [{'type': 'text', 'text': 'hello'}],
                          'stop_reason': 'end_turn', 'stop_sequence': None, 'usage': USAGE})
        self.assertRegex(answered.json['id'], r'^msg_[0-9a-f]{24}$')
        fields = {name: answered.headers[name] for name in answered.headers
                  if name.startswith('x-proxy-')}
        self.assertEqual(fields, {
            'x-proxy-key': 'oa', 'x-proxy-provider': 'openai', 'x-proxy-model': 'gpt-5.4',
            'x-proxy-fallback': f'{OPUS} -> gpt-5.4', 'x-proxy-attempts': 'a=429,oa/gpt-5.4=200'})
        record = self.record()
        self.assertEqual((record['provider'], record['upstream_model'], record['output_tokens'],
                          record['status']), ('openai', 'gpt-5.4', 7, 200))

    def test_nothing_of_openais_answer_but_its_meaning_reaches_the_client(self):
        fields = {'openai-organization': 'org', 'set-cookie': 'x=1', 'x-request-id': 'req_theirs',
                  'content-type': 'application/json'}
        for body, play in (
                (messages_body(), Play(200, fields, CHAT_HELLO)),
                (messages_body(stream=True), Play(stream=chat_stream({'content': 'a'}))),
                (messages_body(),
                 openai_refusal(400, 'x', set_cookie='x=1', openai_organization='org'))):
            answered, _ = self.openai_one({'oa': play}, keys='', body=body)
            names = {name for name in answered.headers if not name.startswith('x-proxy-')}
            self.assertLessEqual(names, {'content-type', 'content-length', 'date', 'request-id',
                                         'transfer-encoding', 'cache-control'})
            self.assertRegex(answered.headers['request-id'], '^req_proxy_')

    def test_nothing_of_the_clients_credentials_reaches_openai(self):
        fields = [('x-api-key', 'mine'), ('authorization', 'Bearer mine'), ('anthropic-beta', 'b'),
                  ('anthropic-version', 'v'), ('x-app', 'cli')]
        self.serve(self.failover(FakeUpstream(oa=Play(body=CHAT_HELLO)),
                                 make_config(**with_openai('oa'))), fields=fields)
        head = self.upstream.sent[0].head.decode().lower()
        for word in ('mine', 'anthropic', 'x-app', 'x-api-key'):
            self.assertNotIn(word, head)

    def test_a_stream_of_openais_comes_as_claudes_event_by_event(self):
        data = chat_stream({'content': 'hel'}, {'content': 'lo'})
        for stream in (data, pieces(data, 7), [data[:-20], SILENCE, SILENCE, data[-20:]]):
            answered, _ = self.openai_one({'a': RATE_LIMITED, 'oa': Play(stream=stream)},
                                          body=messages_body(stream=True))
            events = [event for event in answered.events if event['type'] != 'ping']
            self.assertEqual([event['type'] for event in events], [
                'message_start', 'content_block_start', 'content_block_delta',
                'content_block_delta', 'content_block_stop', 'message_delta', 'message_stop'])
            self.assertEqual((events[0]['message']['model'], events[-2]['usage'],
                              answered.is_complete), (OPUS, USAGE, True))
            self.assertEqual(self.record()['input_tokens'], 10)

    def test_a_model_that_thinks_in_silence_is_covered_by_pings(self):
        stream = [chat_stream(finish=None, usage=None, is_done=False), SILENCE, SILENCE,
                  chat_stream({'content': 'a'})]
        answered, _ = self.openai_one({'oa': Play(stream=stream)}, keys='',
                                      body=messages_body(stream=True))
        self.assertEqual([event['type'] for event in answered.events][:3],
                         ['ping', 'ping', 'message_start'])
        answered, _ = self.openai_one(
            {'oa': Play(stream=[SILENCE, chat_stream({'content': 'a'})])}, keys='')
        self.assertEqual(answered.json['content'][0]['text'], 'a')  # a plain request just waits
        error = {'code': 'server_error', 'message': 'no'}
        stream = [SILENCE, f'data: {json.dumps({"error": error})}\n\n'.encode()]
        answered, _ = self.openai_one({'oa': Play(stream=stream)}, keys='',
                                      body=messages_body(stream=True))
        self.assertEqual((answered.status, answered.events[-1]['error']['type']),
                         (200, 'api_error'))

    def test_a_credential_that_is_a_word_of_the_message_does_not_change_what_it_means(self):
        document = make_document(**with_openai('oa', queueWaitMs=0))
        document['openaiKeys']['oa']['token'] = 'x'
        too_long = openai_refusal(400, None, "This model's maximum context length is 8192 tokens.")
        answered = self.serve(self.failover(FakeUpstream(client=too_long),
                                            cf.parse_config(document)))
        self.assertEqual((answered.status, answered.error['message'][:18]),
                         (400, 'prompt is too long'))
        unsupported = openai_refusal(400, None, "Unsupported parameter: 'max_completion_tokens' "
                                     "is not supported.")
        answered = self.serve(self.failover(
            FakeUpstream(client=[unsupported, Play(body=CHAT_HELLO)]), cf.parse_config(document)))
        self.assertEqual((answered.status, json.loads(self.upstream.sent[-1].body)['max_tokens']),
                         (200, 100))

    def test_a_parameter_that_is_no_name_is_no_parameter(self):
        for parameter in ('0', '[0]', '-'):
            play = Play(400, body={'error': {'message': 'Unsupported value', 'param': parameter}})
            answered, _ = self.openai_one({'oa': play}, keys='')
            self.assertEqual((answered.status, answered.error['type']),
                             (400, 'invalid_request_error'))

    def test_pings_go_on_while_a_plain_answer_takes_its_time(self):
        late = Play(body=CHAT_HELLO)
        late.pieces[:0] = [SILENCE, SILENCE]
        answered, _ = self.openai_one({'oa': late}, keys='', body=messages_body(stream=True))
        self.assertEqual([event['type'] for event in answered.events][:3],
                         ['ping', 'ping', 'message_start'])

    def test_pings_go_on_while_what_comes_is_nothing_for_the_client(self):
        hidden = chat_stream({'reasoning_content': 'hm'}, finish=None, usage=None, is_done=False)
        for pieces_ in ([b': comment\n\n', SILENCE, b': comment\n\n', SILENCE,
                         chat_stream({'content': 'a'})],
                        [hidden, SILENCE, hidden, SILENCE, chat_stream({'content': 'a'})],
                        [SILENCE, SILENCE, chat_stream({'content': 'a'})]):  # also before the head
            answered, _ = self.openai_one({'oa': Play(stream=pieces_)}, keys='',
                                          body=messages_body(stream=True))
            self.assertEqual([event['type'] for event in answered.events][:3],
                             ['ping', 'ping', 'message_start'])

    def test_an_answer_that_is_whole_does_not_wait_for_the_upstream_to_close(self):
        whole = responses_stream(text_delta('a'), completed())
        failed = responses_stream({'type': 'response.failed',
                                   'response': {'error': {'code': 'rate_limit_exceeded'}}})
        for stream in (False, True):
            for first, tried in ((whole, ['oa']), (failed, ['oa', 'ob'])):
                self.cooldowns.clear()
                script = {'oa': Play(stream=[first, AssertionError('read on')]),
                          'ob': Play(stream=whole)}
                script['oa'].pieces.insert(1, SILENCE)
                with mock.patch.object(FakeUpstreamResponse, 'wait',
                                       lambda self, seconds: self._pieces[:1] != [SILENCE]):
                    answered, seen = self.openai_one(script, keys='', openai=('oa', 'ob'),
                                                     openaiApi='responses',
                                                     body=messages_body(stream=stream))
                self.assertEqual((answered.status, [id for id, _ in seen]), (200, tried))

    def test_an_answer_whose_very_end_is_cut_is_whole(self):
        for stream in (False, True):
            for play in (Play(stream=[responses_stream(text_delta('a'), completed()),
                                      cf.UpstreamCut('x')]),
                         Play(stream=[chat_stream({'content': 'a'}, is_done=False),
                                      cf.UpstreamCut('x')])):
                api = ('responses' if b'response.completed' in play.pieces[0]
                       else 'chat_completions')
                answered, seen = self.openai_one({'oa': play}, keys='', openaiApi=api,
                                                 body=messages_body(stream=stream))
                self.assertEqual((answered.status, len(seen), answered.is_complete),
                                 (200, 1, True))
                if stream:
                    self.assertEqual(answered.events[-1]['type'], 'message_stop')

    def test_an_empty_stream_is_asked_for_once_more_as_a_plain_answer(self):
        too_long = openai_refusal(400, 'context_length_exceeded',
                                  "This model's maximum context length is 8192 tokens.")
        for second, status in ((too_long, 400), (Play(body=CHAT_HELLO), 200),
                               (Play(stream=b''), 502)):
            answered, seen = self.openai_one({'oa': [Play(stream=b''), second]}, keys='',
                                             body=messages_body(stream=True))
            self.assertEqual((answered.status, len(seen), self.cooling()), (status, 2, {}))
            self.assertNotIn('stream', json.loads(self.upstream.sent[1].body))
        self.assertEqual(self.record()['attempts'][0]['result'], 'empty_stream')

    def test_an_endless_answer_to_a_plain_request_is_not_kept(self):
        endless = [chat_stream({'content': 'x' * 500}, finish=None, usage=None, is_done=False)] * 5
        with mock.patch.object(cf, 'MAX_BODY_BYTES', 2000):
            answered, _ = self.openai_one({'oa': Play(stream=endless)}, keys='')
        self.assertEqual(answered.status, 502)

    def test_a_json_answer_to_a_streamed_request_and_a_stream_to_a_plain_one_are_understood(self):
        answered, _ = self.openai_one({'oa': Play(body=CHAT_HELLO)}, keys='',
                                      body=messages_body(stream=True))
        self.assertEqual((answered.events[0]['type'], answered.events[-1]['type']),
                         ('message_start', 'message_stop'))
        answered, _ = self.openai_one({'oa': Play(stream=chat_stream({'content': 'a'}))}, keys='')
        self.assertEqual(answered.json['content'], [{'type': 'text', 'text': 'a'}])

    def test_a_chatgpt_login_is_asked_in_the_responses_format_also_for_a_plain_answer(self):
        play = Play(stream=responses_stream(text_delta('a'), completed()))
        document = make_document(**with_openai('oa', queueWaitMs=0))
        document['openaiKeys']['oa']['token'] = make_login()
        answered = self.serve(self.failover(FakeUpstream(login=play), cf.parse_config(document)))
        self.assertEqual(answered.json['content'], [{'type': 'text', 'text': 'a'}])
        self.assertIn(b'POST /backend-api/codex/responses HTTP/1.1\r\nhost: chatgpt.com',
                      self.upstream.sent[0].head)
        self.assertIs(json.loads(self.upstream.sent[0].body)['stream'], True)

    def test_each_answer_of_openai_has_its_consequence(self):
        """Two OpenAI keys: (answer of oa, keys tried, what cools, client's status)."""
        pair, key = ('oa', 'gpt-5.4'), ('oa', None)
        both = ['oa', 'ob']
        for play, tried, cooled, status in (
                (Play(body=CHAT_HELLO), ['oa'], {}, 200),
                (openai_refusal(400, 'invalid_value', 'no'), ['oa'], {}, 400),
                (openai_refusal(422, 'x'), ['oa'], {}, 400),
                (openai_refusal(429, 'rate_limit_exceeded', retry_after='20'), both,
                 {pair: 20}, 200), (openai_refusal(429, 'rate_limit_exceeded', 'try again in 42s'),
                                    both, {pair: 42}, 200),
                (openai_refusal(429, 'insufficient_quota'), both, {key: 3600}, 200),
                (openai_refusal(401, 'invalid_api_key'), both, {key: 300}, 200),
                (openai_refusal(403, 'unsupported_country_region_territory'), both, {}, 200),
                (openai_refusal(403, 'insufficient_permissions'), both, {key: 300}, 200),
                (openai_refusal(404, 'model_not_found'), both, {pair: 3600}, 200),
                (openai_refusal(500, 'server_error'), ['oa', *both], {}, 200),
                (openai_refusal(503, 'server_is_overloaded'), both, {pair: 10}, 200),
                (Play(200, body=b'<html>'), ['oa', *both], {}, 200),
                (Play(302, {'location': 'https://x'}), both, {}, 200),
                (cf.UpstreamUnreachable('x: refused', False), ['oa'], {}, 502),
                (Play(stream=responses_stream({'type': 'error',
                                               'error': {'code': 'rate_limit_exceeded'}})),
                 both, {pair: 30}, 200),
                (Play(stream=b'data: {"error":{"code":"server_error"}}\n\n'), ['oa', *both],
                 {}, 200), (Play(stream=chat_stream({'content': 'a'}, finish=None, is_done=False)),
                            both, {}, 200),
                (Play(body=CHAT_HELLO, stream=[cf.UpstreamCut('x')]), both, {}, 200)):
            with self.subTest(answer=(play.status, play.pieces) if isinstance(play, Play)
                              else play):
                self.cooldowns.clear()
                answered, seen = self.openai_one({'oa': play, 'ob': Play(body=CHAT_HELLO)},
                                                 keys='', openai=('oa', 'ob'))
                self.assertEqual(([id for id, _ in seen], self.cooling(), answered.status),
                                 (tried, cooled, status))
                if status == 400:
                    self.assertEqual(answered.error,
                                     {'type': 'invalid_request_error', 'message': 'no'})

    def test_a_prompt_that_is_too_long_is_told_so_that_the_client_compacts(self):
        for play in (
                openai_refusal(400, 'context_length_exceeded', 'This has 300000 tokens.'),
                Play(stream=b'data: {"error":{"code":"context_length_exceeded","message":"This '
                     b'has 300000 tokens."}}\n\n')):
            for stream in (False, True):
                answered, _ = self.openai_one({'oa': play}, keys='',
                                              body=messages_body(stream=stream))
                self.assertEqual((answered.status, answered.error),
                                 (400, {'type': 'invalid_request_error',
                                        'message': 'prompt is too long: This has 300000 tokens.'}))

    def test_a_prompt_that_leaves_no_room_however_little_is_wanted_is_too_long(self):
        message = ("This model's maximum context length is 8192 tokens. However, you requested "
                   "9100 tokens (7000 in the messages, 1000 "
                   'in the functions, and 1100 in the completion).')
        answered, _ = self.openai_one(
            {'oa': openai_refusal(400, 'context_length_exceeded', message)},
            keys='', body=messages_body(max_tokens=1100))
        self.assertEqual(json.loads(self.upstream.sent[-1].body)['max_completion_tokens'], 192)
        self.assertEqual((answered.status, answered.error['message'][:18]),
                         (400, 'prompt is too long'))

    def test_an_unsupported_parameter_is_left_out_and_remembered_for_this_server_and_model(self):
        def refuse_temperature(body):
            if 'temperature' in body:
                return openai_refusal(400, 'unsupported_parameter', "Unsupported parameter: "
                                      "'temperature' is not supported with this model.")
            return Play(body=CHAT_HELLO)
        failover = self.failover(FakeUpstream(oa=[refuse_temperature]),
                                 make_config(**with_openai('oa')))
        for expected in (2, 3):
            self.assertEqual(self.serve(failover, messages_body(temperature=0.5)).status, 200)
            self.assertEqual(len(self.upstream.seen), expected)
        self.log.info.assert_called_once_with('repair', model='gpt-5.4', repair='parameter',
                                              subject='temperature')

    def test_a_repair_that_did_not_help_is_not_remembered(self):
        def play(body):
            complaint = "Unknown parameter: 'stop'." if 'stop' in body else 'Something else.'
            return (Play(body=CHAT_HELLO) if 'fine' in json.dumps(body)
                    else openai_refusal(400, 'x', complaint))
        config = make_config(**with_openai('oa', openaiModelMapping={'*': 'llama'}))
        failover = self.failover(FakeUpstream(oa=[play]), config)
        self.assertEqual(self.serve(failover, messages_body(stop_sequences=['x'])).status, 400)
        self.serve(failover, messages_body(stop_sequences=['x'], system='fine'))
        self.assertIn('stop', json.loads(self.upstream.sent[-1].body))

    def test_a_complaint_that_stays_is_the_clients(self):
        stubborn = openai_refusal(400, 'unsupported_parameter',
                                  "Unsupported parameter: 'top_p' is not supported.")
        for changes, tried in (({'top_p': 0.5}, 2),
                               ({}, 1)):    # what was not sent cannot be left out
            answered, seen = self.openai_one({'oa': stubborn}, keys='',
                                             body=messages_body(**changes))
            self.assertEqual((answered.status, len(seen), answered.error['type']),
                             (400, tried, 'invalid_request_error'))

    def test_useless_complaints_of_one_client_cost_the_others_nothing(self):
        def play(body):
            if 'temperature' in body:
                return openai_refusal(400, 'x', "Unsupported parameter: 'temperature' is not "
                                      "supported with this model.")
            return (openai_refusal(400, 'x', f"Invalid schema: 'min{len(self.upstream.seen)}' is "
                                   "not permitted.")
                    if 'bad' in json.dumps(body) else Play(body=CHAT_HELLO))
        failover = self.failover(FakeUpstream(oa=[play]), make_config(**with_openai('oa')))
        for _ in range(cf.MAX_REPAIRS + 1):
            self.assertEqual(self.serve(failover, messages_body(system='bad')).status, 400)
        self.assertEqual(self.serve(failover, messages_body(temperature=0.5)).status, 200)

    def test_an_effort_that_one_client_may_not_have_leaves_others_theirs(self):
        def play(body):
            if body.get('reasoning_effort') == 'xhigh':
                return openai_refusal(
                    400, 'unsupported_value',
                    "Unsupported value: 'reasoning_effort' does not support 'xhigh' with "
                    "this model. Supported values are: 'low', 'medium', and 'high'.")
            return Play(body=CHAT_HELLO)
        failover = self.failover(FakeUpstream(oa=[play]), make_config(**with_openai('oa')))
        for wanted, sent in (('xhigh', 'high'), ('medium', 'medium'), ('xhigh', 'high'),
                             ('low', 'low')):
            self.serve(failover, messages_body(output_config={'effort': wanted}))
            self.assertEqual(json.loads(self.upstream.sent[-1].body)['reasoning_effort'], sent)
        self.assertEqual(len(self.upstream.sent), 5)

    def test_a_complaint_that_names_its_parameter_only_beside_the_message_is_mended(self):
        for message, sent in (("Unsupported value: 'high' is not supported with the 'gpt-5-pro' "
                               "model. Supported values are: 'medium'.", 'medium'),
                              ("Invalid value: 'high'. Supported values are: 'low'.", 'low'),
                              ('Unsupported value.', None)):
            refused = Play(400, body={'error': {'message': message, 'param': 'reasoning.effort',
                                                'code': 'unsupported_value'}})
            hello = Play(stream=responses_stream(text_delta('a'), completed()))
            answered, _ = self.openai_one({'oa': [refused, hello]}, keys='', openaiApi='responses',
                                          body=messages_body(output_config={'effort': 'high'}))
            reasoning = json.loads(self.upstream.sent[-1].body).get('reasoning')
            self.assertEqual((answered.status, reasoning), (200, {'effort': sent} if sent else {}))

    def test_a_server_that_asks_for_the_responses_format_gets_it_until_restart(self):
        def play(body):
            if 'messages' in body:
                return openai_refusal(400, None, 'Function tools are not supported here. To use '
                                      'them, use /v1/responses')
            return Play(stream=responses_stream(text_delta('a'), completed()))
        failover = self.failover(FakeUpstream(oa=[play]), make_config(**with_openai('oa')))
        for stream in (False, True):
            self.assertEqual(self.serve(failover,
                                        messages_body(stream=stream, tools=[WEATHER])).status, 200)
        self.assertEqual([re.search(rb'POST (\S+)', sent.head).group(1)
                          for sent in self.upstream.sent],
                         [b'/v1/chat/completions', b'/v1/responses', b'/v1/responses'])

    def test_the_queue_comes_before_the_last_resort_and_waits_for_both_after_it(self):
        slow, fast = (refusal(429, 'rate_limit_error', 'x', retry_after=seconds)
                      for seconds in ('20', '3000'))
        limited = openai_refusal(429, 'rate_limit_exceeded', retry_after='15')
        hello = Play(body=CHAT_HELLO)
        for script, tried in (
                # Claude is back in 20 s: waits for it.
                ({'a': [slow, Play()], 'oa': hello}, ['a', 'a']),
                ({'a': fast, 'oa': hello}, ['a', 'oa']),    # in 50 min: does not
                ({'a': fast, 'oa': [limited, hello]}, ['a', 'oa', 'oa']),  # but for OpenAI it does
                ({'a': slow, 'oa': hello}, ['a', 'a', 'a', 'a', 'a', 'oa'])):   # time is up
            with self.subTest(tried=tried):
                self.cooldowns.clear()
                answered, seen = self.openai_one(script, queueWaitMs=90_000)
                self.assertEqual(([id for id, _ in seen], answered.status), (tried, 200))

    def test_a_key_that_cannot_be_asked_at_all_does_not_keep_a_request_from_waiting(self):
        slow = refusal(429, 'rate_limit_error', 'x', retry_after='2')
        document = make_document('a', **with_openai('oa', queueWaitMs=20_000, modelFallback={}))
        document['openaiKeys']['oa']['token'] = make_login(exp=1)
        document['profiles']['default'] = {'port': 0,
                                           'priorityOrder': ['openai:oa', 'anthropic:a']}
        answered = self.serve(self.failover(FakeUpstream(a=[slow, Play()]),
                                            cf.parse_config(document)))
        self.assertEqual((answered.status, answered.headers['x-proxy-queued']), (200, '2'))

    def test_a_model_that_both_providers_call_the_same_is_given_up_for_one_of_them(self):
        for play in (refusal(529, 'overloaded_error', 'x'), SERVER_TROUBLE):
            answered, seen = self.openai_one({'a': play, 'b': play, 'c': play, 'oa': Play(
                body=CHAT_HELLO)}, keys='abc', openaiModelMapping={})
            self.assertEqual((answered.status, seen[-1]), (200, ('oa', OPUS)))
            self.cooldowns.clear()
        document = make_document('a', 'b', **with_openai('oa', queueWaitMs=0, modelFallback={}))
        document['profiles']['default'] = {'port': 0, 'priorityOrder': ['anthropic:a', 'openai:oa',
                                                                        'anthropic:b']}
        about_this = refusal(429, 'rate_limit_error', 'x', x_should_retry='true')
        answered = self.serve(self.failover(FakeUpstream(a=about_this, oa=Play(body=CHAT_HELLO)),
                                            cf.parse_config(document)))
        self.assertEqual(answered.status, 200)

    def test_a_held_stream_goes_on_with_openais_answer(self):
        slow = refusal(429, 'rate_limit_error', 'x', retry_after='40')
        answered, _ = self.openai_one({'a': slow,
                                       'oa': Play(stream=chat_stream({'content': 'a'}))},
                                      body=messages_body(stream=True), queueWaitMs=60_000)
        types = [event['type'] for event in answered.events]
        self.assertEqual((types[0], types[-1], types.count('message_start')),
                         ('ping', 'message_stop', 1))

    def test_a_claude_model_that_nobody_knows_is_told_and_not_replaced(self):
        answered, seen = self.openai_one({'a': NO_MODEL, 'oa': Play(body=CHAT_HELLO)})
        self.assertEqual((answered.status, answered.error['type'], len(seen)),
                         (404, 'not_found_error', 1))
        self.cooldowns.clear()
        missing = refusal(404, 'not_found_error', 'model: gpt-5.4-mini')
        answered, seen = self.openai_one({'a': missing, 'oa': Play(body=CHAT_HELLO)},
                                         body=messages_body(model='gpt-5.4-mini'))
        self.assertEqual((answered.status, seen[-1]), (200, ('oa', 'gpt-5.4-mini')))

    def test_what_cannot_be_translated_is_refused_or_told_as_exhausted(self):
        body = messages_body(tool_choice={'type': 'tool', 'name': 'nope'})
        answered, seen = self.openai_one({'oa': Play(body=CHAT_HELLO)}, keys='', body=body)
        self.assertEqual((answered.status, answered.error['type'], seen),
                         (400, 'invalid_request_error', []))
        self.assertIn("no tool 'nope'", answered.error['message'])
        answered, _ = self.openai_one({'a': RATE_LIMITED, 'oa': Play(body=CHAT_HELLO)}, body=body)
        self.assertEqual((answered.status, answered.error['type']), (429, 'rate_limit_error'))

    def test_what_is_no_messages_request_at_all_is_refused_before_it_is_sent(self):
        for body in ({'messages': [{'role': 'user', 'content': 'x'}]}, {'model': OPUS}):
            answered, seen = self.openai_one({'oa': Play(body=CHAT_HELLO)}, keys='', body=body)
            self.assertEqual((answered.status, answered.error['type'], seen),
                             (400, 'invalid_request_error', []))
        with mock.patch.object(cf, 'clean_schema', side_effect=RecursionError):
            answered, seen = self.openai_one({'oa': Play(body=CHAT_HELLO)}, keys='',
                                             body=messages_body(tools=[WEATHER]))
        self.assertEqual((answered.status, seen), (400, []))
        self.assertIn('nested too deeply', answered.error['message'])

    def test_a_stream_that_falls_silent_after_its_beginning_ends_with_an_error(self):
        for problem in (cf.UpstreamTimeout(), cf.UpstreamCut('reset')):
            stream = [chat_stream({'content': 'a'}, finish=None, is_done=False), problem, problem]
            answered, _ = self.openai_one({'oa': Play(stream=stream)}, keys='',
                                          body=messages_body(stream=True))
            self.assertEqual((answered.events[-1]['error']['type'], answered.is_complete,
                              self.record()['outcome']), ('api_error', True, 'failed'))

    def test_a_token_that_a_stream_quotes_is_hidden(self):
        document = make_document(**with_openai('oa', queueWaitMs=0))
        document['openaiKeys']['oa']['token'] = 'my-own-secret'
        stream = (chat_stream({'content': 'a'}, finish=None, is_done=False)
                  + b'data: {"error":{"message":"bad my-own-secret"}}\n\n')
        answered = self.serve(self.failover(FakeUpstream(client=Play(stream=stream)),
                                            cf.parse_config(document)), messages_body(stream=True))
        self.assertEqual(answered.events[-1]['error']['message'], 'bad ...')
        self.assertNotIn('my-own-secret', json.dumps(self.record()))

    def test_a_call_without_a_name_is_dropped_and_told(self):
        self.openai_one({'oa': Play(stream=chat_stream(call_delta(0, 'c', arguments='{}')))},
                        keys='', body=messages_body(stream=True))
        self.assertEqual([call.args for call in self.log.warn.mock_calls],
                         [('call_without_name',)])

    def test_what_was_left_out_is_one_line_in_the_log(self):
        body = messages_body(tools=[WEATHER, {'type': 'computer_20250124', 'name': 'c'}],
                             mcp_servers=[{'name': 'x'}])
        self.openai_one({'oa': [openai_refusal(500, 'x'), Play(body=CHAT_HELLO)]}, keys='',
                        body=body)
        told = [call for call in self.log.warn.mock_calls if call.args == ('left_out',)]
        self.assertEqual([call.kwargs['fields'] for call in told],
                         [['tool computer_20250124', 'mcp_servers']])

    def test_a_login_that_is_over_is_told_once_and_costs_no_request(self):
        document = make_document('a', **with_openai('oa', queueWaitMs=0))
        document['openaiKeys']['oa']['token'] = make_login(exp=START - 60)
        failover = self.failover(FakeUpstream(a=RATE_LIMITED), cf.parse_config(document))
        for _ in range(2):
            answered = self.serve(failover)
            self.assertEqual(answered.status, 429)
            self.assertIn('the ChatGPT login expired 60 s ago', answered.error['message'])
        self.assertEqual([call.args for call in self.log.error.mock_calls],
                         [('token_unavailable',)])
        self.assertNotIn('eyJ', repr(self.log.mock_calls) + answered.body.decode())

    def test_a_token_that_openai_quotes_is_hidden(self):
        quoting = openai_refusal(401, 'invalid_api_key',
                                 f'Incorrect API key provided: {openai_token_of("oa")}')
        answered, _ = self.openai_one({'oa': quoting}, keys='')
        self.assertEqual(answered.status, 401)
        self.assertNotIn('0123456789', answered.body.decode() + json.dumps(self.record()) + repr(
            self.log.mock_calls))

    def test_without_a_claude_key_counting_and_listing_are_answered_here(self):
        config = make_config(**with_openai(
            'oa', openaiModelMapping={OPUS: 'gpt-5.4', 'claude-haiku-*': 'x', '*': 'gpt-5.4'}))
        failover = self.failover(FakeUpstream(), config)
        counted = self.serve(failover, target='/v1/messages/count_tokens?beta=true')
        self.assertEqual((counted.status, list(counted.json)), (200, ['input_tokens']))
        self.assertEqual(self.serve(failover, {'messages': []},
                                    target='/v1/messages/count_tokens').status, 400)
        listed = self.serve(failover, method='GET', target='/v1/models?limit=1000')
        self.assertEqual(([model['id'] for model in listed.json['data']], listed.json['has_more']),
                         ([OPUS], False))
        one = self.serve(failover, method='GET', target=f'/v1/models/{OPUS}')
        self.assertEqual((one.status, one.json['id'], one.json['type']), (200, OPUS, 'model'))
        for method, target in (('POST', '/v1/messages/batches'), ('GET', '/v1/files'),
                               ('DELETE', f'/v1/models/{OPUS}'), ('GET', '/v1/models/nope')):
            refused = self.serve(failover, method=method, target=target)
            self.assertEqual((refused.status, refused.error['type']), (404, 'not_found_error'))
            self.assertIn('needs an Anthropic key', refused.error['message'])
        self.assertEqual(self.upstream.seen, [])

    def test_counting_by_claude_is_spared_our_own_marks_too(self):
        body = messages_body(messages=[{'role': 'assistant', 'content': [
            {'type': 'thinking', 'thinking': '', 'signature': 'cfo1:x'},
            {'type': 'text', 'text': 'a'}]}])
        self.serve(self.failover(FakeUpstream(a=Play()), make_config('a')), body,
                   target='/v1/messages/count_tokens')
        self.assertNotIn(b'cfo1', self.upstream.sent[0].body)

    def test_claude_sees_no_marks_of_ours_where_another_provider_may_answer(self):
        body = messages_body(messages=[{'role': 'assistant', 'content': [
            {'type': 'thinking', 'thinking': '', 'signature': 'cfo1:x'},
            {'type': 'text', 'text': 'a'}]}])
        failover = self.failover(FakeUpstream(a=Play(), b=Play()),
                                 make_config('a', **with_openai('oa')))
        self.assertEqual(self.serve(failover, body).status, 200)
        self.assertNotIn(b'cfo1', self.upstream.sent[0].body)

    def test_only_a_post_is_a_message(self):
        refused = self.serve(self.failover(FakeUpstream(), make_config(**with_openai('oa'))),
                             method='DELETE')
        self.assertEqual(refused.status, 404)

    def test_counting_is_estimated_when_every_claude_key_is_limited(self):
        config = make_config('a', **with_openai('oa'))
        counted = self.serve(self.failover(FakeUpstream(a=RATE_LIMITED), config),
                             target='/v1/messages/count_tokens')
        self.assertEqual((counted.status, list(counted.json)), (200, ['input_tokens']))
        listed = self.serve(self.failover(FakeUpstream(a=RATE_LIMITED), config), method='GET',
                            target='/v1/models')
        self.assertEqual(listed.status, 429)

    def test_thinking_that_claude_misses_after_an_openai_turn_is_switched_off_for_this_request(
            self):
        def play(body):
            if 'thinking' in body:
                return refusal(400, 'invalid_request_error',
                               'messages.1.content.0.type: Expected `thinking` or '
                               '`redacted_thinking`, but found `tool_use`.')
            return Play()
        failover = self.failover(FakeUpstream(a=[play]), make_config('a'))
        for expected in (2, 4):     # it is about the conversation: nothing is learnt for the model
            self.assertEqual(self.serve(failover,
                                        messages_body(thinking={'type': 'adaptive'})).status, 200)
            self.assertEqual(len(self.upstream.seen), expected)

    def test_the_record_of_a_request_tells_its_chain(self):
        self.one({'a': RATE_LIMITED, 'b': Play()})
        record = self.record()
        self.assertEqual([(a['key'], a['status'], a['result']) for a in record['attempts']],
                         [('a', 429, 'rate_limited'), ('b', 200, 'answered')])
        self.assertEqual((record['outcome'], record['key'], record['status'], record['model'],
                          record['input_tokens'], record['output_tokens']),
                         ('answered', 'b', 200, OPUS, 10, 5))


# ==============================================================================
# Autostart
# ==============================================================================

ODD_PATHS = ('/home/me/plain', '/home/me/with space/and "quotes"', "/it's/100%/a & b",
             '/b\u00fcro/\u4e16\u754c', '/back\\slash/$HOME/x;y')


class AutostartTest(ScratchTest):
    def test_what_launchd_reads_back_is_what_was_meant(self):
        for path in ODD_PATHS:
            command = ['/usr/bin/python3', f'{path}/claude_failover.py', '--config',
                       f'{path}/config.json', 'start']
            read = plistlib.loads(cf.launchd_plist(command, {'SSL_CERT_FILE': path},
                                                   f'{path}/out'))
            self.assertEqual((read['ProgramArguments'], read['EnvironmentVariables'],
                              read['StandardErrorPath']),
                             (command, {'SSL_CERT_FILE': path}, f'{path}/out'))
            self.assertEqual((read['RunAtLoad'], read['KeepAlive'], read['ThrottleInterval']),
                             (True, {'SuccessfulExit': False}, 10))

    def test_a_line_end_in_a_path_or_variable_is_refused(self):
        for platform in ('linux', 'darwin', 'win32'):
            for config, environ, word in (
                    ('/x\nExecStartPre=/bin/false\n#', {}, 'ExecStartPre'),
                    ('/x\ry', {}, '/x y'), ('/x\x1by', {}, '/x.y'), ('/x\udcffy', {}, '/x.y'),
                    ('/x', {'HTTPS_PROXY': 'http://p\nExecStopPost=/bin/false'},
                     'HTTPS_PROXY.*line end')):
                with self.subTest(config=config, platform=platform), \
                        self.assertRaisesRegex(cf.FailoverError, word):
                    cf.find_autostart(config, environ, platform, '/home/u')
        cf.find_autostart('/x\ty \u00fc\u3000z', {'OTHER': '\n'}, 'linux', '/home/u')

    def test_words_are_quoted_for_systemd(self):
        for word, quoted in (('plain', '"plain"'), ('a b', '"a b"'), ('a"b', '"a\\"b"'),
                             ('100%', '"100%%"'), ('a\\b', '"a\\\\b"'), ('$X', '"$$X"')):
            self.assertEqual(cf.systemd_quoted(word, is_command=True), quoted)
        self.assertEqual(cf.systemd_quoted('A=$X'), '"A=$X"')

    @needs('/usr/bin/systemd-analyze')
    def test_systemd_accepts_the_unit_whatever_its_paths(self):
        for number, path in enumerate(ODD_PATHS):
            folder = self.folder + path
            os.makedirs(folder)
            os.symlink(sys.executable, os.path.join(folder, 'python3'))
            unit = os.path.join(self.folder, f'claude-failover-{number}.service')
            with open(unit, 'wb') as file:
                file.write(cf.systemd_unit([os.path.join(folder, 'python3'), *cf.BOOT,
                                            f'{folder}/claude_failover.py', 'start'],
                                           {'SSL_CERT_FILE': path}))
            os.chmod(unit, 0o644)
            done = subprocess.run(['/usr/bin/systemd-analyze', 'verify', '--user', '--man=no',
                                   unit], capture_output=True, text=True,
                                  env={**os.environ, 'XDG_RUNTIME_DIR': self.folder}, timeout=60)
            self.assertEqual((done.returncode, done.stderr.replace(self.folder, '')),
                             (0, ''), path)

    def test_what_starts_the_proxy_takes_no_module_of_the_folder_it_is_started_in(self):
        with open(os.path.join(self.folder, 'json.py'), 'w') as file:
            file.write('raise SystemExit("taken")')
        command = cf.start_command(sys.executable, '/c')[:-3]
        done = subprocess.run([*command, '--version'], cwd=self.folder, capture_output=True,
                              text=True, timeout=60)
        self.assertEqual((done.stdout.split(), done.stderr), ([cf.PROGRAM, cf.VERSION], ''))

    def test_the_interpreter_is_one_that_an_upgrade_does_not_take_away(self):
        cellar = '/opt/homebrew/Cellar/python@3.12/3.12.4/bin/python3.12'
        links = {'/opt/homebrew/opt/python@3.12/bin/python3.12': cellar,
                 '/opt/homebrew/bin/python3': cellar, '/usr/bin/python3': '/usr/bin/python3.9'}

        def stable(executable, on_path, present):
            return cf.stable_interpreter(executable, lambda name: on_path,
                                         lambda path: path in present,
                                         lambda path: links.get(path, path))
        every = {cellar, *links}
        for executable, on_path, present, expected in (
                (cellar, None, every, '/opt/homebrew/opt/python@3.12/bin/python3.12'),
                (cellar, '/opt/homebrew/bin/python3',
                 every - {'/opt/homebrew/opt/python@3.12/bin/python3.12'},
                 '/opt/homebrew/bin/python3'),
                (cellar, '/usr/bin/python3', {cellar, '/usr/bin/python3'}, cellar),
                ('/usr/bin/python3.9', '/usr/bin/python3', {*every, '/usr/bin/python3.9'},
                 '/usr/bin/python3.9')):
            self.assertEqual(stable(executable, on_path, present), expected)

    def test_each_system_has_its_manager_with_absolute_paths_and_what_the_proxy_needs(self):
        environ = {'HTTPS_PROXY': 'http://proxy:8080', 'SSL_CERT_FILE': '/ca.pem', 'PATH': '/bin',
                   'ANTHROPIC_API_KEY': 'secret'}
        for platform, manager, end in (('darwin', 'launchd',
                                        'Library/LaunchAgents/com.github.claude-failover.plist'),
                                       ('linux', 'systemd',
                                        '.config/systemd/user/claude-failover.service'),
                                       ('win32', 'Windows', 'autostart.cmd')):
            found = cf.find_autostart('/c/config.json', environ, platform, '/home/me')
            self.assertEqual((found.manager, found.path.startswith('/home/me/'),
                              found.path.endswith(end)), (manager, True, True))
            text = found.content.decode()
            self.assertIn(SCRIPT, text)
            self.assertIn('/c/config.json', text)
            self.assertNotIn('secret', text)
            if manager != 'Windows':
                for value in ('http://proxy:8080', '/ca.pem', manager):
                    self.assertIn(value, text)
        moved = cf.find_autostart('/c', {'XDG_CONFIG_HOME': '/xdg'}, 'linux', '/home/me')
        self.assertEqual(moved.path, '/xdg/systemd/user/claude-failover.service')
        with self.assertRaisesRegex(cf.FailoverError, 'plan9'):
            cf.find_autostart('/c', {}, 'plan9', '/home/me')


# ==============================================================================
# Tool setup
# ==============================================================================

URL = 'http://localhost:4080'
#: Claude Code's settings as they may be, all of them valid.
SETTINGS_TEXTS = ('', '{}', '{}\n', ' {\n}\n', '{"model": "opus"}',
                  '{"a":{"}":"}"},"env":{"X":"}"}}', '{"env":{}}', '{\n  "model": "opus",\n'
                  '  "permissions": {\n    "allow": ["Bash(echo:*)"]\n  }\n}\n',
                  '{\n\t"env": {\n\t\t"X": "1"\n\t},\n\t"b": [1,  2]\n}',
                  '{\r\n    "a": 1\r\n}\r\n', '\ufeff{\n  "a": 1\n}\n',
                  '{\n  "env": {\n    "ANTHROPIC_BASE_URL": "https://other.example"\n  }\n}\n',
                  '{"a": 1, "a": 2}', '{"\u00fc": "\u4e16"}')
RC_TEXTS = ('', 'alias x=y\n', 'alias x=y', 'export A=1\r\nexport B=2\r\n', 'a\n\n\n')


class ToolSetupTest(ScratchTest):
    def setUp(self):
        super().setUp()
        self.settings = os.path.join(self.folder, '.claude', 'settings.json')
        self.zshrc = os.path.join(self.folder, '.zshrc')
        self.environ = {}

    def setup(self, platform='linux'):
        return cf.ToolSetup(self.path, self.folder, self.environ, platform)

    def tool(self, id):
        return next(tool for tool in cf.TOOLS if tool.id == id)

    def put(self, path, text):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as file:
            file.write(text if isinstance(text, bytes) else text.encode())

    def get(self, path):
        with open(path, 'rb') as file:
            return file.read()

    def configure(self, id='claude-code', url=URL, **options):
        return self.setup().configure(self.tool(id), url, **options)

    def undo(self, id='claude-code', *ours):
        return self.setup().undo(self.tool(id), {URL, *ours})

    def environment(self):
        return json.loads(self.get(self.settings).decode('utf-8-sig')).get('env')

    def test_settings_gain_two_variables_and_change_in_nothing_else(self):
        for text in SETTINGS_TEXTS:
            with self.subTest(text=text):
                self.put(self.settings, text)
                self.assertTrue(self.configure().is_change)
                before = json.loads(text.lstrip('\ufeff') or '{}')
                wanted = {'ANTHROPIC_BASE_URL': URL, 'ANTHROPIC_AUTH_TOKEN': 'claude-failover'}
                after = json.loads(self.get(self.settings).decode('utf-8-sig'))
                self.assertEqual(after, {**before, 'env': {**before.get('env', {}), **wanted}})
                self.assertEqual(list(after), list({**before, 'env': {}}))  # and in the same order
                kept = [line for line in text.splitlines() if line.strip(' {}[],')
                        and 'ANTHROPIC' not in line]
                self.assertEqual([line for line in kept if line.rstrip(',') not in self.get(
                    self.settings).decode() and '\n' in text.strip()], [])
                self.assertFalse(self.configure().is_change)
                self.undo()
                self.assertEqual(self.get(self.settings), text.encode())
                self.assertFalse(os.path.exists(self.setup().record_path))

    def test_new_lines_of_settings_look_like_the_old_ones(self):
        for text, after in (
                ('{"a": 1}', '{"a": 1, "env": {"ANTHROPIC_BASE_URL": "u"}}'),
                ('{\n\t"a": 1\n}\n',
                 '{\n\t"a": 1,\n\t"env": {\n\t\t"ANTHROPIC_BASE_URL": "u"\n\t}\n}\n'),
                ('{\r\n "env": {\r\n  "X": "1"\r\n }\r\n}',
                 '{\r\n "env": {\r\n  "X": "1",\r\n  "ANTHROPIC_BASE_URL": "u"\r\n }\r\n}'),
                ('', '{\n  "env": {\n    "ANTHROPIC_BASE_URL": "u"\n  }\n}\n')):
            self.assertEqual(cf.settings_with(text, {'ANTHROPIC_BASE_URL': 'u'}), after)

    def test_a_start_up_file_gains_a_marked_block_and_gets_each_byte_back(self):
        lines = {'zsh': "export ANTHROPIC_BASE_URL='http://localhost:4080'",
                 'bash': "export ANTHROPIC_BASE_URL='http://localhost:4080'",
                 'fish': "set -gx ANTHROPIC_BASE_URL 'http://localhost:4080'"}
        for id, line in lines.items():
            path = self.tool(id).place(self.setup())
            for text in RC_TEXTS + (b'caf\xe9 # latin-1\n',):
                with self.subTest(tool=id, text=text):
                    self.put(path, text)
                    self.configure(id)
                    self.assertIn(f'# >>> claude-failover >>>\n{line}\n# <<< claude-failover '
                                  f'<<<\n', self.get(path).decode('latin-1').replace('\r\n', '\n'))
                    self.assertFalse(self.configure(id).is_change)
                    self.configure(id, 'http://localhost:5000')
                    self.assertEqual(self.get(path).count(b'>>> claude-failover'), 1)
                    self.undo(id)
                    self.assertEqual(self.get(path),
                                     text if isinstance(text, bytes) else text.encode())

    @needs('/usr/bin/zsh')
    @needs('/usr/bin/fish')
    def test_the_shells_read_the_blocks(self):
        for id, command in (('zsh', ('/usr/bin/zsh', '-i')), ('bash', ('/bin/bash', '-i')),
                            ('fish', ('/usr/bin/fish',))):
            self.configure(id)
            done = subprocess.run([*command, '-c', 'printenv ANTHROPIC_BASE_URL'],
                                  capture_output=True, text=True, timeout=60,
                                  env={'HOME': self.folder, 'PATH': '/usr/bin:/bin'},
                                  stdin=subprocess.DEVNULL)
            self.assertEqual(done.stdout.strip().splitlines()[-1:], [URL], done.stderr)

    def test_a_file_that_setup_made_is_taken_away_again(self):
        for id in cf.TOOL_IDS:
            path = self.tool(id).place(self.setup())
            change = self.configure(id)
            self.assertEqual((change.before, stat.S_IMODE(os.stat(path).st_mode)), (None, 0o600))
            self.assertIsNone(self.undo(id).after)
            self.assertFalse(os.path.exists(path))

    def test_what_a_user_edited_since_stays_when_ours_goes(self):
        self.put(self.settings, '{\n  "a": 1\n}\n')
        self.configure()
        self.put(self.settings, self.get(self.settings).replace(b'"a": 1', b'"a": 2').replace(
            b'env": {', b'env": {\n    "X": "y",'))
        self.undo()
        self.assertEqual(json.loads(self.get(self.settings)), {'a': 2, 'env': {'X': 'y'}})
        self.put(self.zshrc, 'one\n')
        self.configure('zsh')
        self.put(self.zshrc, self.get(self.zshrc) + b'two\n')
        self.undo('zsh')
        self.assertEqual(self.get(self.zshrc), b'one\ntwo\n')

    def test_an_address_that_was_there_before_comes_back_also_after_edits(self):
        before = '{"env": {"ANTHROPIC_BASE_URL": "https://other.example", "X": "1"}}'
        self.put(self.settings, before)
        self.configure()
        self.put(self.settings, self.get(self.settings) + b'\n')
        self.undo()
        self.assertEqual(self.environment(),
                         {'ANTHROPIC_BASE_URL': 'https://other.example', 'X': '1'})

    def test_an_address_that_a_user_set_since_is_not_ours(self):
        self.configure()
        self.put(self.settings, '{"env": {"ANTHROPIC_BASE_URL": "https://other.example", '
                 '"ANTHROPIC_AUTH_TOKEN": "claude-failover"}}')
        self.undo()
        self.assertEqual(self.environment(), {'ANTHROPIC_BASE_URL': 'https://other.example'})

    def test_without_a_record_what_looks_like_ours_goes(self):
        self.put(self.settings, '{"a": 1}')
        self.configure(url='http://localhost:5000')
        for record in ('{ broken', None):
            self.put(self.setup().record_path, record) if record else os.unlink(
                self.setup().record_path)
            self.undo()
            # Not of this configuration.
            self.assertEqual(self.environment(), {'ANTHROPIC_BASE_URL': 'http://localhost:5000'})
            self.undo('claude-code', 'http://localhost:5000')
            self.assertIsNone(self.environment())
            self.configure(url='http://localhost:5000')

    def test_a_second_address_still_gives_the_first_text_back(self):
        self.put(self.settings, '{"a": 1}')
        self.configure()
        self.configure(url='http://localhost:5000')
        self.assertEqual(self.environment()['ANTHROPIC_BASE_URL'], 'http://localhost:5000')
        self.undo()
        self.assertEqual(self.get(self.settings), b'{"a": 1}')

    def test_a_token_is_set_only_where_there_is_no_login_or_one_is_asked_for(self):
        credentials, state = (os.path.join(self.folder, '.claude', '.credentials.json'),
                              os.path.join(self.folder, '.claude.json'))
        for prepare in (lambda: self.put(credentials, '{}'),
                        lambda: self.put(state, '{"oauthAccount": {"x": 1}}'),
                        lambda: self.put(self.settings, '{"apiKeyHelper": "x"}'),
                        lambda: self.environ.update(ANTHROPIC_API_KEY='x'), lambda: self.put(
                            self.settings, '{"env": {"ANTHROPIC_AUTH_TOKEN": "mine"}}')):
            prepare()
            self.configure()
            self.assertNotIn('claude-failover', self.get(self.settings).decode())
            self.configure(access_token='open-sesame')
            self.assertEqual(self.environment()['ANTHROPIC_AUTH_TOKEN'], 'open-sesame')
            self.undo()
            shutil.rmtree(os.path.join(self.folder, '.claude'))
            self.environ.clear()
            if os.path.exists(state):
                os.unlink(state)

    def test_files_that_must_not_be_touched_are_left_alone_with_the_reason(self):
        for text, words in (('{ broken', 'not valid JSON'), ('{"a": 1,}', 'not valid JSON'),
                            ('// c\n{}', 'not valid JSON'), ('[1]', 'not valid JSON'),
                            ('{"env": []}', 'no object'), ('[' * 100_000, 'not valid JSON')):
            self.put(self.settings, text)
            for edit in (self.configure, self.undo):
                with self.subTest(text=text[:20], edit=edit), \
                        self.assertRaisesRegex(cf.ToolError, words):
                    edit()
            self.assertEqual(self.get(self.settings), text.encode())
        self.put(self.zshrc, 'a\n')
        os.chmod(self.zshrc, 0o444)
        with self.assertRaisesRegex(cf.ToolError, 'read-only'):
            self.configure('zsh')
        os.unlink(self.zshrc)
        os.mkdir(self.zshrc)
        with self.assertRaisesRegex(cf.ToolError, 'zsh: .*zshrc cannot be used .Is a directory'):
            self.configure('zsh')
        self.assertEqual(self.setup().state(self.tool('zsh')).problem,
                         'cannot be used (Is a directory)')

    def test_a_file_that_has_the_access_token_is_for_its_owner_alone(self):
        for mode, after in ((0o644, 0o600), (0o664, 0o600), (0o755, 0o700), (0o600, 0o600)):
            self.put(self.settings, '{}')
            os.chmod(self.settings, mode)
            self.configure(access_token='open-sesame', is_dry=True)
            self.assertEqual(stat.S_IMODE(os.stat(self.settings).st_mode), mode)
            for _ in range(2):        # a file in which it stands already, too
                change = self.configure(access_token='open-sesame')
                self.assertEqual(stat.S_IMODE(os.stat(self.settings).st_mode), after)
                self.assertEqual('only you can read it' in change.text, mode != after)
                os.chmod(self.settings, mode)
            self.configure(access_token='open-sesame')
            self.undo()
            self.assertEqual(stat.S_IMODE(os.stat(self.settings).st_mode),
                             after)     # never wider again by us

    def test_mode_and_links_of_a_file_stay(self):
        real = os.path.join(self.folder, 'dotfiles', 'zshrc')
        self.put(real, 'a\n')
        os.chmod(real, 0o640)
        os.symlink(real, self.zshrc)
        self.configure('zsh')
        self.assertTrue(os.path.islink(self.zshrc))
        self.assertEqual(stat.S_IMODE(os.stat(real).st_mode), 0o640)
        self.assertIn(b'localhost', self.get(real))
        self.undo('zsh')
        self.assertEqual((self.get(real), os.path.islink(self.zshrc)), (b'a\n', True))

    def test_a_dry_run_writes_nothing(self):
        self.put(self.zshrc, 'a\n')
        self.assertTrue(self.configure('zsh', is_dry=True).is_change)
        self.assertEqual(self.get(self.zshrc), b'a\n')
        self.configure('zsh')
        self.assertTrue(self.setup().undo(self.tool('zsh'), set(), is_dry=True).is_change)
        self.assertIn(b'localhost', self.get(self.zshrc))

    def test_a_full_disk_leaves_the_file_as_it_was(self):
        self.put(self.zshrc, 'a\n')
        with mock.patch('os.fsync', side_effect=OSError(28, 'No space left on device')), \
                self.assertRaisesRegex(cf.ToolError, 'No space'):
            self.configure('zsh')
        self.assertEqual((self.get(self.zshrc), os.listdir(os.path.dirname(self.path))),
                         (b'a\n', []))

    def test_tools_are_found_where_they_are_used(self):
        self.environ.update(SHELL='/bin/bash')
        with mock.patch('shutil.which', return_value=None):
            found = {state.tool.id: state.is_found for state in self.setup().states()}
            self.assertEqual(found,
                             {'claude-code': False, 'zsh': False, 'bash': True, 'fish': False})
            self.put(self.settings, '{}')
            self.put(os.path.join(self.folder, '.config', 'fish', 'config.fish'), '')
            found = {state.tool.id: state.is_found for state in self.setup().states()}
        self.assertEqual(found, {'claude-code': True, 'zsh': False, 'bash': True, 'fish': True})
        self.environ.update(CLAUDE_CONFIG_DIR='/claude', ZDOTDIR='/z', XDG_CONFIG_HOME='/x')
        self.assertEqual(
            [tool.place(self.setup('darwin')).replace(self.folder, '') for tool in cf.TOOLS],
            ['/claude/settings.json', '/z/.zshrc', '/.bash_profile', '/x/fish/config.fish'])


# ==============================================================================
# HTTP server
# ==============================================================================

class PretendServer(cf.PretendUpstream):
    """The demo's upstream, which notes what it is asked, and can be held up."""

    def __init__(self, test):
        self.seen = []                # [(key id, method, path, body), ...]
        self.gone = threading.Event() # a client of ours left in the middle of an answer
        self.hold = None              # an Event: answers wait for it
        self.asked_for = threading.Semaphore(0)
        self.connections = 0
        super().__init__()
        test.addCleanup(self.close)

    def process_request(self, request, client_address):
        self.connections += 1
        super().process_request(request, client_address)

    def finish_request(self, request, client_address):
        self.watched = request
        super().finish_request(request, client_address)

    def reply(self, asked):
        self.seen.append((asked.key, asked.method, asked.path, asked.body or None))
        self.asked_for.release()
        while self.hold and not self.hold.is_set():
            if cf.readable([self.watched]) and cf.has_left(self.watched):
                self.gone.set()
                raise ConnectionAbortedError
            self.hold.wait(0.01)
        return self.answer(asked)


class PretendAnthropic(PretendServer):
    """A Messages API.  Keys in `limited` answer 429; a prompt that says `write PATH` is answered
    by a Write tool call, then by text."""

    def __init__(self, test):
        self.limited = set()
        self.refused = set()          # key ids that get a 401
        self.fields = []              # more header fields of every answer
        self.limits = lambda body: False      # requests that any key answers with 429
        super().__init__(test)

    def answer(self, asked):
        fields = [('request-id', 'req_upstream'), cf.JSON_TYPE, *self.fields]
        if asked.key in self.refused:
            return cf.Reply(401, fields, cf.error_json('authentication_error', 'bad key'))
        if asked.key in self.limited or asked.body and self.limits(asked.body):
            return cf.Reply(429, [*fields, ('retry-after', '3000')],
                            cf.error_json('rate_limit_error', 'slow down'))
        if asked.path.startswith('/v1/models'):
            listing = {'data': [cf.model_info(OPUS)], 'has_more': False, 'first_id': OPUS,
                       'last_id': OPUS}
            return cf.Reply(200, fields, json.dumps(listing).encode())
        if asked.path.startswith(cf.COUNT_TOKENS_PATH):
            return cf.Reply(200, fields, b'{"input_tokens": 42}')
        if asked.body.get('stream'):
            stream = [fields[0], ('content-type', 'text/event-stream'), *self.fields]
            return cf.Reply(200, stream,
                            pieces=tuple(pieces(stream_bytes(message_events(asked.body)), 100)))
        return cf.Reply(200, fields,
                        json.dumps({**MESSAGE, 'model': asked.body.get('model')}).encode())


def next_write(told, results):
    """(path to write or None, text) that a pretend model answers: one Write call for each `write
    PATH` of the prompt, then a last word."""
    wanted = list(dict.fromkeys(re.findall(r'write (/[\w ./-]+?\.txt)', told)))
    if results < len(wanted):
        return wanted[results], 'Writing.'
    return None, 'Done: file written.' if wanted else 'hello'


def write_arguments(path):
    return json.dumps({'file_path': path, 'content': 'written through the proxy\n'})


def message_events(body):
    """The events that answer a request: a Write call when the prompt asks for one."""
    told = json.dumps(body['messages'])
    path, text = next_write(told, told.count('"tool_result"'))
    events = stream_events(text)
    if path is None:
        return events
    call = {'type': 'tool_use', 'id': f'toolu_{told.count("tool_result")}', 'name': 'Write',
            'input': {}}
    arguments = write_arguments(path)
    events[-2:-2] = [
        {'type': 'content_block_start', 'index': 1, 'content_block': call},
        *({'type': 'content_block_delta', 'index': 1,
           'delta': {'type': 'input_json_delta', 'partial_json': part}}
          for part in re.findall('.{1,9}', arguments)),
        {'type': 'content_block_stop', 'index': 1}]
    events[-2]['delta']['stop_reason'] = 'tool_use'
    return events


class PretendOpenAI(PretendServer):
    """Chat Completions and Responses, streamed, with the same task."""

    def __init__(self, test):
        self.answered = lambda: None
        super().__init__(test)

    def answer(self, asked):
        data = (self._chat(asked.body) if asked.path.endswith('/chat/completions')
                else self._responses(asked.body))
        self.answered()
        return cf.Reply(200, [('content-type', 'text/event-stream')], data)

    def _chat(self, body):
        results = sum(message['role'] == 'tool' for message in body['messages'])
        path, text = next_write(json.dumps(body['messages']), results)
        if path is None:
            return chat_stream({'reasoning_content': 'hm'}, {'content': text})
        arguments = map(lambda part: call_delta(0, arguments=part),
                        re.findall('.{1,9}', write_arguments(path)))
        return chat_stream({'content': text}, call_delta(0, f'call_{results}', 'Write'),
                           *arguments, finish='tool_calls')

    def _responses(self, body):
        results = sum(item['type'] == 'function_call_output' for item in body['input'])
        path, text = next_write(json.dumps(body['input']), results)
        reasoning = {'type': 'reasoning', 'summary': [], 'encrypted_content': 'gAAAsealed'}
        call = [] if path is None else [
            item_done(2, function_call(f'call_{results}', write_arguments(path), 'Write'))]
        return responses_stream(item_done(0, reasoning), text_delta(text, 1), *call, completed())


class ProgramTest(ScratchTest):
    """A test with the whole program running, in this process, on ports of its own."""

    KEYS = ('a', 'b')

    def setUp(self):
        super().setUp()
        self.anthropic = PretendAnthropic(self)
        self.start(make_document(*self.KEYS, anthropicBaseUrl=self.anthropic.url))

    def start(self, document):
        self.write_config(document)
        self.app = cf.App(self.path)
        self.app.start()
        self.thread = threading.Thread(target=self.app.run, daemon=True)
        self.thread.start()
        self.port = self.app.ports()['default']
        self.addCleanup(self.stop)

    def stop(self):
        self.app.stop()
        self.thread.join(PATIENCE_S)

    def reload(self, document):
        """Writes another configuration and lets the program look, as it does by itself."""
        self.write_config(document)
        self.moment = getattr(self, 'moment', 0) + 1
        os.utime(self.path, (self.moment, self.moment))
        self.app.reload()

    def raw(self, data, port=None):
        """Sends bytes and reads until the server closes."""
        with connect(port or self.port) as sock:
            sock.sendall(data)
            return read_all(sock)

    def send(self, method='POST', path=cf.MESSAGES_PATH, body=None, port=None, **fields):
        """One request on a connection of its own."""
        if method not in ('POST', 'PUT'):
            body = None
        elif body is None:
            body = messages_body()
        fields = {'host': f'localhost:{self.port}', 'connection': 'close',
                  'x_api_key': 'mine', **fields}
        return Answered(self.raw(request_bytes(method, path, body, **fields), port))

    def log_lines(self, event):
        with open(self.app.log.path) as file:
            return [line for line in map(json.loads, file) if line['event'] == event]


class WorkersTest(unittest.TestCase):
    def run_job(self, workers):
        """The thread that a job ran in, once it waits for the next job."""
        ran = queue.Queue()
        idle = workers._idle
        workers.run(lambda: ran.put(threading.get_ident()))
        thread = ran.get(timeout=PATIENCE_S)
        while workers._idle < max(idle, 1):
            pass
        return thread

    def test_a_thread_that_is_done_serves_the_next_connection(self):
        workers = cf.Workers()
        self.assertEqual(self.run_job(workers), self.run_job(workers))

    def test_jobs_at_once_have_threads_of_their_own_and_only_some_of_these_stay(self):
        workers, together, ended = cf.Workers(), threading.Barrier(4), queue.Queue()

        def job():
            together.wait(PATIENCE_S)
            ended.put(threading.current_thread())
        with mock.patch.object(cf, 'IDLE_WORKERS', 2):
            for _ in range(4):
                workers.run(job)
            threads = [ended.get(timeout=PATIENCE_S) for _ in range(4)]
            while sum(thread.is_alive() for thread in threads) > 2:
                pass
            while workers._idle < 2:
                pass
        self.assertEqual((len(set(threads)), sum(thread.is_alive() for thread in threads)), (4, 2))


#: Sends requests, each on a connection of its own, as a user who owns nothing here.
STRANGER = '''
import json, os, socket, sys
address, port = sys.argv[1], int(sys.argv[2])
requests = json.load(sys.stdin)
os.setgroups([]), os.setgid(65534), os.setuid(65534)
answers = []
for request in requests:
    with socket.socket(socket.AF_INET6 if ':' in address else socket.AF_INET) as sock:
        sock.settimeout(10)
        sock.connect((address, port))
        sock.sendall(request.encode())
        answers.append(b''.join(iter(lambda: sock.recv(65536), b'')).decode('latin-1'))
print(json.dumps(answers))
'''


class HttpServerTest(ProgramTest):
    def test_a_request_is_answered_by_the_next_key_when_the_first_is_limited(self):
        self.anthropic.limited.add('a')
        for stream in (False, True):
            answered = self.send(body=messages_body(stream=stream))
            self.assertEqual((answered.status, answered.headers['x-proxy-key']), (200, 'b'))
            self.assertEqual(answered.headers['request-id'], 'req_upstream')
        self.assertEqual((answered.events, answered.is_complete), (stream_events(), True))
        self.assertEqual([key for key, *_ in self.anthropic.seen], ['a', 'b', 'b'])
        self.stop()
        first, second = self.log_lines('request')
        self.assertEqual([(a['key'], a['status']) for a in first['attempts']],
                         [('a', 429), ('b', 200)])

    def test_every_path_below_v1_goes_on_with_its_query(self):
        for method, path, sent in (
                ('GET', '/v1/models?limit=1000', '/v1/models?limit=1000'),
                ('GET', '/v1/v1/models', '/v1/models'), ('HEAD', '/v1/models', '/v1/models'),
                ('DELETE', '/v1/files/file_1?beta=true', '/v1/files/file_1?beta=true'),
                ('POST', '/v1/messages/batches', '/v1/messages/batches'),
                *(('GET', f'{front}models/x?a=/v1/', '/v1/models/x?a=/v1/')
                  for front in ('/', '//', '/v1//', '//v1/', '///v1///', '/v1//v1/v1/')),
                ('GET', '/models?limit=1', '/v1/models?limit=1'), ('GET', '/models', '/v1/models'),
                ('POST', '/complete', '/v1/complete'),
                ('GET', '/files/f/content', '/v1/files/f/content'),
                ('GET', '/messages/batches/b/results', '/v1/messages/batches/b/results'),
                ('POST', '/messages/count_tokens', '/v1/messages/count_tokens'),
                ('POST', '/v1/messages/count_tokens?beta=true',
                 '/v1/messages/count_tokens?beta=true')):
            with self.subTest(path=path):
                answered = self.send(method, path)
                self.assertEqual(answered.status, 200)
                self.assertEqual(self.anthropic.seen[-1][1:3], (method, sent))
        self.assertEqual(answered.json, {'input_tokens': 42})

    def test_messages_are_messages_with_v1_and_without(self):
        for path in ('/messages', '//messages?beta=true', '/v1//messages', '//v1/messages',
                     '/v1/v1/messages'):
            with self.subTest(path=path):
                self.anthropic.limited = {'a'}
                answered = self.send('POST', path)
                self.assertEqual((answered.status, answered.headers['x-proxy-key']), (200, 'b'))
                self.assertEqual(self.anthropic.seen[-1][2],
                                 path.replace(path.partition('?')[0], '/v1/messages'))
                self.app.cooldowns.clear()

    def test_no_other_path_is_reached_by_more_slashes_or_a_missing_v1(self):
        config = self.read_config()
        for path, status in (('//api/keys', 400), ('///health', 400), ('//dashboard', 400),
                             ('//evil.example/v1/messages', 400), ('/v1/../api/keys', 400),
                             ('/v1//../api/keys', 400), ('//v1/%2e%2e/api/keys', 400),
                             ('/messages/../api/keys', 400), ('/messages/%2e./health', 400),
                             ('/messagesx', 404), ('/modelsandmore/x', 404), ('/%6dessages', 404),
                             ('/v1', 404), ('//v1', 400), ('/v1//', 404), ('/api//keys', 404),
                             ('/x/messages', 404), ('/V1/messages', 404), ('/v1%2fmessages', 404),
                             ('/api/messages', 404), ('/dashboard//api/keys', 200)):
            with self.subTest(path=path):
                self.assertEqual(self.send('GET', path).status, status)
        self.assertEqual((self.anthropic.seen, self.read_config()), ([], config))
        self.send('GET', '/v1//api/keys')
        self.assertEqual(self.anthropic.seen[-1][2], '/v1/api/keys')    # the upstream's, not ours

    def test_a_path_without_v1_is_behind_the_same_checks(self):
        for path in ('/messages', '/models', '/files', '/complete', '//v1/messages',
                     '/v1//messages'):
            for fields in ({'host': 'evil.example'}, {'origin': 'https://evil.example'},
                           {'sec_fetch_site': 'cross-site'}):
                with self.subTest(path=path, fields=fields):
                    self.assertEqual(self.send('POST', path, **fields).status, 403)
            self.assertEqual(self.send('POST', path, content_type='text/plain').status, 415)
        self.assertEqual(self.send('POST', '/files', {},
                                   content_type='multipart/form-data; boundary=x').status, 200)
        self.reload(make_document('a', anthropicBaseUrl=self.anthropic.url,
                                  accessToken='open-sesame'))
        self.anthropic.seen.clear()
        for path in ('/messages', '/models', '/files', '/complete', '//v1/messages'):
            self.assertEqual(self.send('POST', path).status, 401)
        self.assertEqual(self.anthropic.seen, [])

    def test_every_answer_has_one_date(self):
        for method, path, status in (('GET', '/', 200), ('GET', '/health', 200),
                                     ('GET', '/dashboard', 200), ('GET', '/api/status', 200),
                                     ('GET', '/nothing', 404), ('OPTIONS', '/v1/messages', 204),
                                     ('POST', '/v1/messages', 200)):
            with self.subTest(path):
                answered = self.send(method, path)
                dates = [value for name, value in answered.fields if name.lower() == 'date']
                self.assertEqual((answered.status, len(dates)), (status, 1))
                self.assertLess(
                    abs(email.utils.parsedate_to_datetime(dates[0]).timestamp() - time.time()), 60)
        self.assertRegex(self.raw(b'nonsense\r\n\r\n').decode(), r'\A.* 400 [^\0]*\ndate: ')

    def test_probes_and_unknown_paths_get_sensible_answers(self):
        for method, path, status in (
                ('HEAD', '/', 200), ('GET', '/', 200), ('OPTIONS', '/v1/messages', 204),
                ('GET', '/health', 200), ('HEAD', '/health', 200), ('POST', '/health', 405),
                ('GET', '/api/cooldowns/clear', 405),
                ('GET', '/favicon.ico', 404), ('POST', '/api/event_logging/batch', 404),
                ('GET', '/api/claude_cli/bootstrap', 404), ('GET', '/v1', 404)):
            with self.subTest(method=method, path=path):
                answered = self.send(method, path)
                self.assertEqual(answered.status, status)
                if status >= 400:
                    self.assertEqual(answered.json['type'], 'error')
                    self.assertIn('request-id', answered.headers)
        self.assertEqual(self.anthropic.seen, [])

    def test_a_path_tells_the_methods_that_it_takes(self):
        for method, path, status, allow in (
                ('POST', '/health', 405, 'HEAD, GET, OPTIONS'),
                ('PATCH', '/api/keys/a', 405, 'PUT, DELETE, OPTIONS'),
                ('PATCH', '/api/openai-keys?x', 405, 'HEAD, GET, POST, OPTIONS'),
                ('GET', '/clear-cooldowns', 405, 'POST, OPTIONS'),
                ('OPTIONS', '/health', 204, 'HEAD, GET, OPTIONS'),
                ('OPTIONS', '/api/config', 204, 'HEAD, GET, PUT, OPTIONS'),
                ('OPTIONS', '/v1/messages', 204, 'GET, POST, PUT, PATCH, DELETE, HEAD, OPTIONS'),
                ('OPTIONS', '/nothing', 404, None)):
            with self.subTest(method=method, path=path):
                answered = self.send(method, path)
                self.assertEqual((answered.status, answered.headers.get('allow')), (status, allow))

    def test_bodies_may_come_chunked_and_after_100_continue(self):
        body = json.dumps(messages_body()).encode()
        fields = {'content_type': 'application/json', 'connection': 'close'}
        head = request_bytes(transfer_encoding='chunked', **fields)
        self.assertEqual(
            Answered(self.raw(head + chunked(*pieces(body, 7)) + b'0\r\n\r\n')).status, 200)
        self.assertEqual(self.anthropic.seen[-1][3], messages_body())
        fields.update(expect='100-continue', content_length=len(body))
        with connect(self.port) as sock:
            sock.sendall(request_bytes(**fields))
            self.assertEqual(sock.recv(1000), b'HTTP/1.1 100 Continue\r\n\r\n')
            sock.sendall(body)
            self.assertEqual(Answered(read_all(sock)).status, 200)
        refused = self.raw(request_bytes(host='evil.example', **fields))
        self.assertEqual(Answered(refused).status, 403)       # and no 100 before it

    def test_one_connection_serves_many_requests_also_when_they_come_at_once(self):
        body = messages_body()
        data = self.raw(request_bytes(body=body) * 4
                        + request_bytes(body=body, connection='close'))
        self.assertEqual(data.count(b'HTTP/1.1 200 OK'), 5)
        self.assertEqual(self.anthropic.connections, 1)

    def test_a_foreign_host_origin_or_site_is_refused_on_every_path(self):
        port = self.port
        for path, method in ((cf.MESSAGES_PATH, 'POST'), ('/health', 'GET'), ('/', 'GET'),
                             ('/nothing', 'GET'), ('/api/cooldowns/clear', 'POST'),
                             (cf.MESSAGES_PATH, 'OPTIONS')):
            for fields in ({'host': 'evil.example'}, {'host': None},
                           {'host': f'localhost:{port + 1}'}, {'host': '0.0.0.0'},
                           {'host': f'localhost.evil.example:{port}'},
                           {'host': f'localhost:{port}, x'}, {'origin': 'https://evil.example'},
                           {'origin': 'null'}, {'origin': f'http://localhost:{port + 1}'},
                           {'origin': f'https://localhost:{port}'},
                           {'origin': f'http://127.0.0.1:{port}'},
                           {'sec_fetch_site': 'cross-site'}, {'sec_fetch_site': 'same-site'}):
                with self.subTest(path=path, fields=fields):
                    answered = self.send(method, path, **fields)
                    self.assertEqual(answered.status, 403)
                    self.assertEqual(answered.error['type'], 'permission_error')
                    self.assertFalse([name for name in answered.headers
                                      if name.startswith('access-control')])
        self.assertEqual(self.anthropic.seen, [])

    def test_our_own_names_and_pages_pass_the_guard(self):
        port = self.port
        for fields in ({'host': f'localhost:{port}'}, {'host': f'127.0.0.1:{port}'},
                       {'host': f'[::1]:{port}'}, {'host': 'localhost'},
                       {'host': f'LOCALHOST:{port}'}, {'origin': f'http://localhost:{port}'},
                       {'sec_fetch_site': 'same-origin'}, {'sec_fetch_site': 'none'},
                       {'sec_fetch_mode': 'cors'}):
            with self.subTest(fields=fields):
                self.assertEqual(self.send(**fields).status, 200)

    def test_allowed_hosts_and_origins_are_exact(self):
        self.reload(make_document('a', anthropicBaseUrl=self.anthropic.url,
                                  allowedHosts=['box:4080', 'dev.internal'],
                                  allowedOrigins=['https://app.example']))
        for fields, status in (
                ({'host': 'box:4080'}, 200),
                ({'host': 'box'}, 403), ({'host': 'dev.internal:1'}, 200),
                ({'host': 'dev.internal'}, 200), ({'host': 'dev.internal.evil'}, 403),
                ({'origin': 'https://app.example', 'sec_fetch_site': 'cross-site'}, 200),
                ({'origin': 'https://app.example.evil'}, 403),
                ({'origin': 'http://app.example'}, 403),
                ({'host': 'dev.internal:1, evil.example'}, 403),
                ({'host': 'evil.example, dev.internal:1'}, 403),
                ({'host': 'dev.internal:1\r\nHost: evil.example'}, 403),
                ({'host': 'dev.internal:evil'}, 403), ({'host': 'dev.internal:'}, 403),
                ({'host': 'box:4080:1'}, 403), ({'host': 'dev.internal:\u0661'}, 403)):
            with self.subTest(fields=fields):
                self.assertEqual(self.send(**fields).status, status)

    #: What answers without the access token: whoever has none sees here where to enter it.
    OPEN_TO_ALL = ('/', '/dashboard', '/dashboard/x', '/api/login')

    def addresses(self):
        """Yields (method, path) for every route, each method of it and each shape of its path."""
        for route in cf.ROUTES:
            for pattern in route.pattern.pattern.split('|'):
                for prefix in ('', 'openai-'):
                    for rest in ('', '/x'):
                        path = pattern.replace('(openai-)?', prefix).replace(
                            '([^/]+)', 'x').replace('(?:/.*)?', rest)
                        path = path.replace('/.+', '/messages').replace('/.*', '/x')
                        self.assertTrue(route.pattern.fullmatch(path), path)
                        yield from ((method, path) for method in (*route.methods, 'OPTIONS'))

    def test_every_route_is_behind_the_guard(self):
        addresses = sorted(set(self.addresses()))
        self.assertGreater(len(addresses), 50)
        before = self.read_config()
        for method, path in addresses:
            for fields in ({'host': f'evil.example:{self.port}'},
                           {'origin': 'https://evil.example'},
                           {'origin': f'http://localhost:{self.port}0'},
                           {'origin': f'http://localhost:{self.port}.evil.example'},
                           {'sec_fetch_site': 'cross-site'}):
                with self.subTest(method=method, path=path, fields=fields):
                    self.assertEqual(self.send(method, path, {}, **fields).status, 403)
        self.assertEqual((self.anthropic.seen, self.read_config()), ([], before))

    def test_every_route_asks_for_the_access_token_but_those_that_lead_to_it(self):
        self.reload(make_document('a', anthropicBaseUrl=self.anthropic.url,
                                  accessToken='open-sesame'))
        before = self.read_config()
        for method, path in sorted(set(self.addresses())):
            if method == 'OPTIONS' or path in self.OPEN_TO_ALL:
                continue
            for fields in ({}, {'x_api_key': None}, {'authorization': 'Bearer open-sesam'}):
                with self.subTest(method=method, path=path, fields=fields):
                    self.assertEqual(self.send(method, path, {}, **fields).status, 401)
        self.assertEqual((self.anthropic.seen, self.read_config()), ([], before))

    def test_a_comparison_in_constant_time_alone_decides_on_a_secret(self):
        self.reload(make_document('a', anthropicBaseUrl=self.anthropic.url,
                                  accessToken='open-sesame'))
        cookie = self.send('POST', '/api/login',
                           {'token': 'open-sesame'}).headers['set-cookie'].partition(';')[0]
        attempts = (    # (the same request with the right secret, and with a wrong one)
                    (('GET', '/health', {}, {'x_api_key': 'open-sesame'}),
                     ('GET', '/health', {}, {'x_api_key': 'x'})),
                    (('GET', '/health', {}, {'authorization': 'Bearer open-sesame'}),
                     ('GET', '/health', {}, {'authorization': 'Bearer x'})),
                    (('GET', '/health', {}, {'cookie': cookie}),
                     ('GET', '/health', {}, {'cookie': 'claude-failover=x'})),
                    (('POST', '/api/login', {'token': 'open-sesame'}, {}),
                     ('POST', '/api/login', {'token': 'x'}, {})))
        for right, wrong in attempts:
            for equal, asked, status in ((False, right, 401), (True, wrong, 200)):
                method, path, body, fields = asked
                with self.subTest(asked=asked), \
                        mock.patch.object(cf.hmac, 'compare_digest', return_value=equal):
                    self.assertEqual(self.send(method, path, body, **fields).status, status)
        self.reload(make_document('a', anthropicBaseUrl=self.anthropic.url))
        with mock.patch.object(cf.hmac, 'compare_digest', return_value=False):
            self.assertEqual(self.send('PUT', '/api/keys/a', {'baseUrl': 'http://localhost:1',
                                                              'token': token_of('a')}).status, 400)

    def test_every_answer_of_our_own_forbids_what_a_page_could_do_with_it(self):
        path = os.path.join(self.folder, 'dashboard.html')
        with open(path, 'w') as file:
            file.write('<style>a</style><script>b</script>')
        for method, address, fields in (
                ('GET', '/health', {}), ('GET', '/api/config', {}), ('GET', '/api/logs', {}),
                ('GET', '/', {}), ('GET', '/', {'accept': 'text/html'}),
                ('OPTIONS', '/v1/messages', {}), ('GET', '/nothing', {}), ('POST', '/health', {}),
                ('GET', '/health', {'host': 'evil.example'}),
                ('GET', '/dashboard?code=x', {}), ('GET', '/dashboard', {})):
            with self.subTest(method=method, address=address, fields=fields), \
                    mock.patch.object(cf, 'DASHBOARD_PATH', path):
                headers = self.send(method, address, **fields).headers
                self.assertEqual([headers.get(name)
                                  for name in ('cache-control', 'x-content-type-options',
                                               'x-frame-options')],
                                 ['no-store', 'nosniff', 'DENY'])
                self.assertFalse([name for name in headers if name.startswith('access-control')])
                policy = dict(part.split(' ', 1)
                              for part in headers['content-security-policy'].split('; '))
                self.assertEqual(policy.pop('default-src'), "'none'")
        self.assertEqual({name: value for name, value in policy.items()
                          if name not in ('script-src', 'style-src')},
                         {'connect-src': "'self'", 'img-src': "'self' data:",
                          'frame-ancestors': "'none'", 'base-uri': "'none'",
                          'form-action': "'none'"})
        self.assertNotIn('unsafe', str(policy))
        self.assertEqual(headers['referrer-policy'], 'no-referrer')

    def test_an_access_token_stands_in_no_line_of_the_log(self):
        self.reload(make_document('a', anthropicBaseUrl=self.anthropic.url,
                                  accessToken='open-sesame', logLevel='debug'))
        self.send('POST', '/api/login', {'token': 'open-sesame'})
        self.send('GET', '/dashboard?code=open-sesame')
        for fields in ({'x_api_key': 'open-sesame'}, {'authorization': 'Bearer open-sesame'}):
            self.send(**fields)
            self.send('PUT', '/api/config', {'accessToken': 'open-sesame', 'x': 1}, **fields)
            self.send('PUT', '/api/config', {'accessToken': 'open-sesame'}, **fields)
        self.send('GET', '/health', x_api_key='not-open-sesame')
        self.stop()
        with open(self.app.log.path) as file:
            lines = file.read()
        self.assertIn('config_changed', lines)
        self.assertNotIn('sesame', lines)

    def ask_as_stranger(self, *requests, address='127.0.0.1'):
        """[Answered, ...] to some raw requests that a program of another user sends."""
        if os.name == 'nt' or os.geteuid() != 0:
            self.skipTest('only root can act as another user')
        done = subprocess.run(
            [sys.executable, '-c', STRANGER, address, str(self.port)], capture_output=True,
            text=True, input=json.dumps([request.decode() for request in requests]), timeout=60)
        self.assertEqual(done.returncode, 0, done.stderr)
        return [Answered(answer.encode('latin-1')) for answer in json.loads(done.stdout)]

    @needs('/proc/net/tcp')           # Linux
    def test_a_program_of_another_user_is_refused_on_every_path(self):
        paths = (('POST', cf.MESSAGES_PATH), ('GET', '/v1/models'), ('GET', '/health'),
                 ('GET', '/'), ('GET', '/nothing'), ('GET', '/dashboard'),
                 ('OPTIONS', '/v1/messages'), ('POST', '/api/login'), ('PUT', '/api/config'))
        requests = [request_bytes(method, path, connection='close') for method, path in paths]
        for address in ('127.0.0.1', '::ffff:127.0.0.1', *(('::1',) if has_ipv6() else ())):
            for path, answered in zip(paths, self.ask_as_stranger(*requests, address=address)):
                with self.subTest(address=address, path=path):
                    self.assertEqual((answered.status, answered.error['type']),
                                     (403, 'permission_error'))
                    self.assertIn('accessToken', answered.error['message'])
        self.assertEqual(self.anthropic.seen, [])
        self.assertEqual(self.send('GET', '/v1/models').status, 200)

    @needs('/proc/net/tcp')
    @unittest.skipUnless(has_ipv6(), 'no IPv6 here')
    def test_a_program_of_another_user_is_refused_by_ipv6_without_netlink_too(self):
        request = b'GET /health HTTP/1.1\r\nHost: [::1]\r\nConnection: close\r\n\r\n'
        with mock.patch.object(cf, 'ask_for_owner', return_value=None):
            answered, = self.ask_as_stranger(request, address='::1')
            self.assertEqual(answered.status, 403)
            self.assertEqual(self.ask_6(request).status, 200)

    def ask_6(self, request):
        with socket.create_connection(('::1', self.port), timeout=PATIENCE_S) as sock:
            sock.sendall(request)
            return Answered(b''.join(iter(lambda: sock.recv(65536), b'')))

    @unittest.skipUnless(has_ipv6(), 'no IPv6 here')
    def test_a_client_by_ipv6_is_served_and_guarded_alike(self):
        body = json.dumps(messages_body()).encode()
        for host, status in ((f'[::1]:{self.port}', 200), (f'localhost:{self.port}', 200),
                             ('[::2]', 403), (f'[::1]:{self.port + 1}', 403)):
            answered = self.ask_6(f'POST /v1/messages HTTP/1.1\r\nHost: {host}\r\n'
                                  f'Content-Type: application/json\r\nConnection: close\r\n'
                                  f'Content-Length: {len(body)}\r\n\r\n'.encode() + body)
            self.assertEqual(answered.status, status)

    @unittest.skipUnless(has_ipv6(), 'no IPv6 here')
    def test_every_port_is_opened_and_closed_on_both_loopback_addresses_and_no_other(self):
        moved = free_port()
        for document in (make_document('a', profiles={'default': {'port': moved}}),
                         make_document('a', profiles={'default': {'port': free_port()}})):
            before = self.port
            self.reload(document)
            self.port = self.app.ports()['default']
            for listener in self.app.listeners.values():
                self.assertEqual({sock.getsockname()[:2] for sock in listener._sockets},
                                 {('127.0.0.1', self.port), ('::1', self.port)})
            for address in ('127.0.0.1', '::1'):
                socket.create_connection((address, self.port), timeout=PATIENCE_S).close()
                self.assertRaises(ConnectionRefusedError, socket.create_connection,
                                  (address, before), PATIENCE_S)
        self.stop()
        for address in ('127.0.0.1', '::1'):
            self.assertRaises(ConnectionRefusedError, socket.create_connection,
                              (address, self.port), PATIENCE_S)

    @unittest.skipUnless(has_ipv6(), 'no IPv6 here')
    def test_a_port_that_is_taken_by_ipv6_alone_is_opened_without_it(self):
        with socket.create_server(('::1', 0), family=socket.AF_INET6) as taken:
            port = taken.getsockname()[1]
            self.reload(make_document('a', profiles={'default': {'port': port}}, logLevel='debug'))
            self.assertEqual((self.app.ports(), self.app.port_problems), ({'default': port}, {}))
            self.assertEqual(self.send('GET', '/health', port=port,
                                       host=f'localhost:{port}').status, 200)
        self.stop()
        line, = self.log_lines('no_ipv6')
        self.assertEqual((line['level'], line['port']), ('debug', port))

    def test_a_system_without_ipv6_is_served_by_ipv4(self):
        port = free_port()
        with mock.patch('socket.create_server',
                        side_effect=OSError(97, 'Address family not supported by protocol')):
            self.reload(make_document('a', profiles={'default': {'port': port}}))
        self.port = self.app.ports()['default']
        self.assertEqual(self.send('GET', '/health').status, 200)

    @needs('/proc/net/tcp')
    def test_a_stranger_who_says_nothing_holds_no_thread(self):
        answered, = self.ask_as_stranger(b'')   # it is refused and let go before it is waited for
        self.assertEqual(answered.status, 403)

    def test_a_stranger_who_waits_is_refused_once_no_access_token_is_asked_for(self):
        request = request_bytes('GET', '/health', x_api_key='open-sesame')
        self.reload(make_document('a', accessToken='open-sesame'))
        waits, read_head = threading.Semaphore(0), cf.ClientConnection.read_head
        with mock.patch.object(cf, 'peer_owner', return_value=os.geteuid() + 1), \
                mock.patch.object(cf.ClientConnection, 'read_head',
                                  lambda connection: waits.release() or read_head(connection)), \
                connect(self.port) as sock:
            sock.sendall(request)
            self.assertEqual(sock.recv(15), b'HTTP/1.1 200 OK')
            self.assertTrue(waits.acquire(timeout=PATIENCE_S)
                            and waits.acquire(timeout=PATIENCE_S))  # for the next request, too
            self.reload(make_document('a'))
            sock.sendall(request)
            rest = read_all(sock)
        self.assertEqual(re.findall(rb'HTTP/1\.1 \d+', rest), [b'HTTP/1.1 403'])

    @needs('/proc/net/tcp')
    def test_with_an_access_token_other_users_are_asked_for_it(self):
        self.reload(make_document('a', anthropicBaseUrl=self.anthropic.url,
                                  accessToken='open-sesame'))
        answers = self.ask_as_stranger(
            *(request_bytes('GET', '/v1/models', connection='close', x_api_key=token)
              for token in (None, 'open-sesame')))
        self.assertEqual([answered.status for answered in answers], [401, 200])

    @needs('/proc/net/tcp')
    def test_the_owner_of_a_connection_is_found_by_netlink_and_without_it(self):
        with socket.create_server(('127.0.0.1', 0)) as listener, \
                socket.create_connection(listener.getsockname()) as near, \
                listener.accept()[0] as far, socket.socket(socket.AF_INET6) as mapped:
            self.assertEqual(cf.peer_owner(far), os.geteuid())
            self.assertEqual(cf.peer_owner(near), os.geteuid())
            mapped.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            mapped.connect(('::ffff:127.0.0.1', listener.getsockname()[1]))
            with listener.accept()[0] as of_mapped, \
                    mock.patch('socket.socket', side_effect=OSError):
                self.assertEqual((cf.peer_owner(far), cf.peer_owner(of_mapped)),
                                 (os.geteuid(),) * 2)
                with mock.patch('builtins.open', side_effect=OSError):
                    self.assertIsNone(cf.peer_owner(far))

    @needs('/proc/net/tcp6')
    @unittest.skipUnless(has_ipv6(), 'no IPv6 here')
    def test_the_owner_of_an_ipv6_connection_is_found_by_either_way(self):
        with socket.create_server(('::1', 0), family=socket.AF_INET6) as listener, \
                socket.create_connection(listener.getsockname()[:2]) as near, \
                listener.accept()[0] as far:
            for ask in (cf.ask_for_owner, cf.look_for_owner):
                owner, inode = ask(far.getpeername(), far.getsockname())
                self.assertEqual((owner, inode), (os.geteuid(), os.fstat(near.fileno()).st_ino))
            near.close()
            self.assertRaises(cf.ClientGone, cf.peer_owner, far)

    @needs('/proc/net/tcp')
    def test_a_connection_that_nobody_holds_any_more_has_no_owner_and_is_not_served(self):
        with socket.create_server(('127.0.0.1', 0)) as listener:
            for leave in (socket.socket.close, lambda sock: cf.ClientConnection(sock).reset()):
                near = socket.create_connection(listener.getsockname())
                near.sendall(b'x')
                with listener.accept()[0] as far:
                    leave(near)       # its socket belongs to no user now, which looks like root's
                    for missing in ((), ('socket.socket',)):
                        with contextlib.ExitStack() as stack:
                            for name in missing:
                                stack.enter_context(mock.patch(name, side_effect=OSError))
                            self.assertRaises(cf.ClientGone, cf.peer_owner, far)

    def test_tables_of_sockets_are_read_only_where_they_are_whole(self):
        for data in (b'', b'x' * 16, b'x' * 87,
                     struct.pack('=IHHIIi', 36, 2, 0, 0, 0, -2) + bytes(16)):
            self.assertIsNone(cf.read_diag_answer(data))
        line = ('0: 0100007F:1F90 0100007F:9C40 01 00000000:00000000 00:00000000 00000000  '
                '1000 0 77 1')
        for text, found in ((line, (1000, 77)), (line.replace('9C40', '9C41'), None),
                            (line[:40], None), ('', None), ('x\n' * 9, None)):
            self.assertEqual(cf.find_in_table(text, '0100007F:1F90', '0100007F:9C40'), found)

    def test_a_body_that_a_web_form_could_send_is_refused(self):
        for content_type in ('text/plain', 'application/x-www-form-urlencoded',
                             'multipart/form-data; boundary=x', None):
            self.assertEqual(self.send('POST', '/api/cooldowns/clear', {},
                                       content_type=content_type).status, 415)
        self.assertEqual(self.send(content_type='text/plain').status, 415)
        self.assertEqual(self.send(content_type='application/json; charset=utf-8').status, 200)

    def test_a_body_that_is_too_large_is_refused_before_it_is_read(self):
        answered = self.send(content_length=cf.MAX_BODY_BYTES + 1)
        self.assertEqual((answered.status, answered.error['type']), (413, 'request_too_large'))

    def test_the_access_token_is_asked_for_and_goes_nowhere(self):
        self.reload(make_document('a', anthropicBaseUrl=self.anthropic.url,
                                  accessToken='open-sesame'))
        for fields, status in (({}, 401), ({'x_api_key': 'wrong'}, 401),
                               ({'x_api_key': 'open-sesame'}, 200),
                               ({'authorization': 'Bearer open-sesame'}, 200),
                               ({'authorization': 'open-sesame-not'}, 401)):
            for method, path in (('POST', cf.MESSAGES_PATH), ('GET', '/health')):
                self.assertEqual(self.send(method, path, **fields).status, status)
        self.assertEqual(self.send('HEAD', '/').status, 200)
        self.assertNotIn('sesame', json.dumps(self.app.health()))

    def test_what_cannot_be_read_is_answered_and_closed(self):
        for data, status in ((b'nonsense\r\n\r\n', 400),
                             (b'GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n', 403),
                             (b'POST / HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n', 400)):
            answered = Answered(self.raw(data))
            self.assertEqual((answered.status, answered.headers['connection']), (status, 'close'))
            self.assertEqual(answered.json['type'], 'error')

    def test_nothing_that_a_client_or_an_upstream_says_becomes_a_field_of_the_answer(self):
        model = 'x\r\nset-cookie: a=b\r\n\r\n<script>\u2028\xfc'
        self.anthropic.fields = [('access-control-allow-origin', '*'),
                                 ('access-control-expose-headers', '*'), ('a', 'b\r\n c: d'),
                                 ('connection', 'keep-alive, X-Hop'),
                                 ('x-hop', 'of this connection alone')]
        for limited in ((), 'ab'):
            self.anthropic.limited.update(limited)
            answered = self.send(body=messages_body(model=model))
            self.assertEqual(answered.status, 429 if limited else 200)
            self.assertFalse({'set-cookie', 'c', 'x-hop', 'access-control-allow-origin',
                              'access-control-expose-headers'} & set(answered.headers))
            self.assertEqual(answered.headers['content-type'], 'application/json')
            self.assertIn('x??set-cookie' if not limited else '',
                          answered.headers.get('x-proxy-model', ''))

    def test_a_redirect_is_told_and_not_followed(self):
        elsewhere = RawServer(self, lambda sock, number: None)
        upstream = RawServer(self, lambda sock, number: (read_request(sock), sock.sendall(
            plain_answer(b'', '302 Found', f'location: {elsewhere.url}/v1/messages\r\n'))))
        self.reload(make_document('a', anthropicBaseUrl=upstream.url))
        self.assertEqual(self.send().status, 302)
        self.assertEqual(elsewhere.connections, 0)

    def test_a_client_that_leaves_ends_its_upstream_request(self):
        self.anthropic.hold = threading.Event()
        with connect(self.port) as sock:
            sock.sendall(request_bytes(body=messages_body()))
            self.assertTrue(self.anthropic.asked_for.acquire(timeout=PATIENCE_S))
        self.assertTrue(self.anthropic.gone.wait(PATIENCE_S))
        self.stop()
        self.assertEqual(self.log_lines('request')[0]['outcome'], 'client_gone')

    def test_connections_above_the_limit_get_a_clear_503(self):
        self.app.slots = threading.BoundedSemaphore(1)
        with connect(self.port) as first:
            first.sendall(request_bytes('GET', '/health'))
            first.recv(100)
            answered = Answered(self.raw(b''))
            self.assertEqual((answered.status, answered.error['type']), (503, 'overloaded_error'))

    def test_a_thread_that_cannot_be_had_costs_one_connection_only(self):
        with mock.patch('threading.Thread.start',
                        side_effect=RuntimeError("can't start new thread")):
            self.assertEqual(Answered(self.raw(b'')).status, 503)
        self.assertEqual(self.send('GET', '/health').status, 200)

    def test_a_cut_answer_to_an_http_1_0_client_is_no_clean_end(self):
        def cut(sock, number):
            read_request(sock)
            sock.sendall(b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n')
        upstream = RawServer(self, cut)
        self.reload(make_document('a', anthropicBaseUrl=upstream.url))
        with self.assertRaises(ConnectionResetError):
            self.raw(b'GET /v1/models HTTP/1.0\r\nHost: localhost\r\n\r\n')

    def test_an_error_of_our_own_is_an_answer_and_a_line_in_the_log(self):
        with mock.patch.object(cf.App, 'health', side_effect=ZeroDivisionError('secret words')):
            answered = self.send('GET', '/health')
        self.assertEqual((answered.status, answered.error['type']), (500, 'api_error'))
        self.stop()
        line = self.log_lines('internal_error')[0]
        self.assertEqual(line['kind'], 'ZeroDivisionError')
        self.assertIn('_serve_one', line['at'])
        self.assertNotIn('secret', json.dumps(line))

    def test_health_tells_all_and_no_token(self):
        self.anthropic.limited.add('a')
        self.send()
        health = self.send('GET', '/health').json
        self.assertEqual((health['status'], health['version'], health['profiles'][0]['port']),
                         ('ok', cf.VERSION, self.port))
        self.assertEqual([(key['id'], key['state'], key['answers']) for key in health['keys']],
                         [('a', 'limited', 0), ('b', 'ready', 1)])
        cooldown = health['cooldowns'][0]
        self.assertEqual((cooldown['key'], cooldown['model'], cooldown['reason'],
                          cooldown['message']), ('a', OPUS, 'rate_limited', 'slow down'))
        self.assertEqual((health['metrics']['requests'], health['metrics']['rotations']), (1, 1))
        self.assertEqual([a['status'] for a in health['recent'][0]['attempts']], [429, 200])
        self.assertNotIn(token_of('a'), json.dumps(health))

    def test_the_dashboard_is_the_file_beside_the_program_and_may_run_only_its_own_parts(self):
        path = os.path.join(self.folder, 'dashboard.html')
        with mock.patch.object(cf, 'DASHBOARD_PATH', path):
            answered = self.send('GET', '/dashboard')
            self.assertEqual(answered.status, 404)
            self.assertIn(path, answered.body.decode())
            with open(path, 'w') as file:
                file.write('<style>a</style><script>b</script>')
            for address in ('/dashboard', '/dashboard/keys'):
                answered = self.send('GET', address)
                self.assertEqual((answered.status, answered.body),
                                 (200, b'<style>a</style><script>b</script>'))
        policy = answered.headers['content-security-policy']
        self.assertIn("script-src 'sha256-PiPoFgA5WUoziU9lZOGxNIu9egCI1CxKy3PurtWcAJ0='", policy)
        self.assertIn("style-src 'sha256-ypeBEsobvcr6wjGzmiPcTaeG7/gUfE5yuYB3ha/uSLs='", policy)

    def test_cooldowns_are_cleared_all_of_a_key_or_of_a_pair(self):
        self.anthropic.limited.update('ab')
        self.send()
        for body, status, cleared in (({'key': 'a', 'model': OPUS}, 200, 1),
                                      ({'key': 'nope'}, 404, None), ({'key': 5}, 400, None),
                                      (b'[]', 400, None), ({'key': 'a'}, 200, 1), ({}, 200, 2),
                                      (b'', 200, 0)):
            with self.subTest(body=body):
                answered = self.send('POST', '/api/cooldowns/clear', body)
                self.assertEqual((answered.status, answered.json.get('cleared')),
                                 (status, cleared))
        self.anthropic.limited.clear()
        self.assertEqual(self.send().headers['x-proxy-key'], 'a')


# ==============================================================================
# Carrying streams
# ==============================================================================

STREAM_HEAD = (b'HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n'
               b'transfer-encoding: chunked\r\n\r\n')


def chunked(*parts):
    return b''.join(b'%x\r\n%b\r\n' % (len(part), part) for part in parts)


class CarryingTest(ProgramTest):
    """Streams through the whole program, whose events one thread passes on."""

    def serve_streams(self, play, wrap=lambda sock: sock, scheme='http://127.0.0.1'):
        """Has `play(sock)` write the streams of the only key's upstream, behind their heads."""
        def serve(sock, number):
            while read_request(sock):
                sock.sendall(STREAM_HEAD)
                play(sock)
        self.server = RawServer(self, serve, wrap)
        self.reload(make_document('a', anthropicBaseUrl=f'{scheme}:{self.server.port}'))

    def stream(self):
        return self.send(body=messages_body(stream=True))

    def test_events_arrive_whole_however_they_were_cut(self):
        whole = stream_bytes()
        for size in (1, 7, 100, len(whole)):
            self.serve_streams(lambda sock, size=size: [sock.sendall(chunked(piece))
                                                        for piece in pieces(whole, size)]
                               and sock.sendall(b'0\r\n\r\n'))
            answered = self.stream()
            self.assertEqual((answered.body, answered.is_complete), (whole, True))
            self.assertEqual(self.server.connections, 1)

    def test_compressed_events_arrive_one_by_one_and_a_flood_of_them_whole(self):
        body = json.dumps(messages_body(stream=True)).encode()
        arrived, flood = threading.Semaphore(0), stream_events('x' * 200_000)

        def play(sock):
            packer = zlib.compressobj(wbits=31)
            sock.sendall(chunked(packer.flush(zlib.Z_SYNC_FLUSH)))
            for event in stream_events():
                sock.sendall(chunked(packer.compress(cf.event_bytes(event)) + packer.flush(
                    zlib.Z_SYNC_FLUSH)))
                if event['type'] == 'content_block_delta':
                    arrived.acquire(timeout=PATIENCE_S)
            sock.sendall(chunked(packer.flush()) + b'0\r\n\r\n')
        with mock.patch.object(sys.modules[__name__], 'STREAM_HEAD',
                               STREAM_HEAD[:-2] + b'content-encoding: gzip\r\n\r\n'):
            self.serve_streams(play)
            with socket.create_connection(('127.0.0.1', self.port), timeout=PATIENCE_S) as sock:
                sock.sendall(b'POST /v1/messages HTTP/1.1\r\nHost: localhost\r\n'
                             b'Connection: close\r\nContent-Type: application/json\r\n'
                             b'Content-Length: %d\r\n\r\n' % len(body) + body)
                data = b''
                for count in range(1, 4):         # the next event comes when this one has
                    while data.count(b'event: content_block_delta') < count:
                        data += sock.recv(65536)
                    arrived.release()
                answered = Answered(data + b''.join(iter(lambda: sock.recv(65536), b'')))
            self.assertEqual((answered.events, answered.is_complete), (stream_events(), True))
            self.serve_streams(lambda sock: sock.sendall(
                chunked(gzip.compress(stream_bytes(flood))) + b'0\r\n\r\n'))
            for _ in range(2):
                answered = self.stream()
                self.assertEqual((len(answered.events), answered.is_complete), (len(flood), True))
            self.assertEqual(self.server.connections, 1)

    def test_silence_before_the_head_and_before_the_content_is_bridged_by_pings(self):
        first, rest = stream_bytes(stream_events()[:1]), stream_bytes(stream_events()[2:])
        pinged = threading.Semaphore(0)
        body = json.dumps(messages_body(stream=True)).encode()

        def play(sock, number):
            while read_request(sock):
                for part in (STREAM_HEAD, chunked(first), chunked(rest) + b'0\r\n\r\n'):
                    pinged.acquire(timeout=PATIENCE_S)
                    sock.sendall(part)
        server = RawServer(self, play)
        self.reload(make_document('a', anthropicBaseUrl=server.url))
        with mock.patch.object(cf, 'PING_S', 0.01):
            for _ in range(2):
                with socket.create_connection(('127.0.0.1', self.port),
                                              timeout=PATIENCE_S) as sock:
                    sock.sendall(b'POST /v1/messages HTTP/1.1\r\nHost: localhost\r\n'
                                 b'Connection: close\r\nContent-Type: application/json\r\n'
                                 b'Content-Length: %d\r\n\r\n' % len(body) + body)
                    data = b''
                    for count in range(1, 4):     # each part comes when its silence was bridged
                        while data.count(cf.PING_EVENT) < count:
                            data += sock.recv(65536)
                        pinged.release()
                        while count == 2 and b'message_start' not in data:
                            data += sock.recv(65536)
                    answered = Answered(data + b''.join(iter(lambda: sock.recv(65536), b'')))
                self.assertEqual(([event for event in answered.events if event['type'] != 'ping'],
                                  answered.is_complete),
                                 ([event for event in stream_events() if event['type'] != 'ping'],
                                  True))
        self.assertEqual(server.connections, 1)

    def test_many_streams_at_once_do_not_mix(self):
        together = threading.Barrier(20)

        def play(sock):
            text = f'I am stream {threading.get_ident()} ' * 20
            first, *rest = pieces(stream_bytes(stream_events(text)), 200)
            sock.sendall(chunked(first))
            together.wait(PATIENCE_S)             # all of them are open now
            sock.sendall(chunked(*rest) + b'0\r\n\r\n')
        self.serve_streams(play)
        answers = queue.Queue()
        for _ in range(20):
            threading.Thread(target=lambda: answers.put(self.stream()), daemon=True).start()
        texts = set()
        for _ in range(20):
            answered = answers.get(timeout=PATIENCE_S)
            self.assertTrue(answered.is_complete)
            texts.add(''.join(event['delta']['text'] for event in answered.events
                              if event['type'] == 'content_block_delta'))
        self.assertEqual((len(texts), {len(set(text.split('I am stream '))) for text in texts}),
                         (20, {2}))

    def test_a_client_that_reads_late_gets_all_of_it_and_holds_up_nobody(self):
        events = stream_events('x')
        events[3:4] = [{**events[3], 'delta': {'type': 'text_delta', 'text': 'x' * 80_000}}] * 100
        big = stream_bytes(events)
        sent = threading.Event()

        def play(sock):
            sock.sendall(chunked(big[:5000]))
            sent.set()
            sock.sendall(chunked(*pieces(big[5000:], 60_000)) + b'0\r\n\r\n')
        self.serve_streams(play)
        with socket.socket() as late:
            late.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            late.settimeout(PATIENCE_S)
            late.connect(('127.0.0.1', self.port))
            late.sendall(request_bytes(body=messages_body(stream=True), connection='close'))
            self.assertTrue(sent.wait(PATIENCE_S))
            self.assertEqual(self.stream().body, big)         # another one, meanwhile
            answered = Answered(read_all(late))
        self.assertEqual((answered.body, answered.is_complete), (big, True))

    def test_a_stream_that_breaks_off_ends_in_an_error(self):
        whole = stream_bytes()
        for end in (b'', b'zz\r\n', b'5\r\nab'):
            carried, carry = threading.Event(), cf.StreamCarrier.carry

            def play(sock, end=end, carried=carried):
                sock.sendall(chunked(whole[:400]))
                carried.wait(PATIENCE_S)          # what breaks before that is another key's turn
                sock.sendall(end)
                sock.shutdown(socket.SHUT_RDWR)
            self.serve_streams(play)
            self.app.cooldowns.clear()
            with mock.patch.object(cf.StreamCarrier, 'carry',
                                   lambda *rest, c=carried: (c.set(), carry(*rest))):
                answered = self.stream()
            self.assertEqual((answered.events[-1]['type'], answered.is_complete), ('error', True))

    def test_a_key_whose_stream_failed_rests_before_its_client_hears_of_it(self):
        carried, carry = threading.Event(), cf.StreamCarrier.carry

        def play(sock):
            sock.sendall(chunked(stream_bytes(stream_events()[:4])))
            carried.wait(PATIENCE_S)
            sock.sendall(chunked(cf.event_bytes(OVERLOADED_EVENT)) + b'0\r\n\r\n')
        self.serve_streams(play)
        resting, send = [], cf.ClientConnection.send

        def watched(connection, data):
            if b'event: error' in data:
                resting.append(len(self.app.cooldowns.snapshot()))
            send(connection, data)
        with mock.patch.object(cf.StreamCarrier, 'carry',
                               lambda *rest: (carried.set(), carry(*rest))[1]), \
                mock.patch.object(cf.ClientConnection, 'send', watched):
            answered = self.stream()
        self.assertEqual((answered.events, answered.is_complete, resting),
                         ([*stream_events()[:4], OVERLOADED_EVENT], True, [1]))

    def test_a_client_that_leaves_in_mid_stream_ends_its_upstream(self):
        gone = threading.Event()

        def play(sock):
            sock.sendall(chunked(stream_bytes()[:400]))
            if not sock.recv(1):
                gone.set()
        self.serve_streams(play)
        with connect(self.port) as sock:
            sock.sendall(request_bytes(body=messages_body(stream=True)))
            self.assertIn(b'message_start', sock.recv(65536))
        self.assertTrue(gone.wait(PATIENCE_S))
        self.assertEqual(self.send('GET', '/health').status, 200)

    def test_streams_over_tls_arrive_too_with_many_events_in_one_record(self):
        path, context = tls_files(self)
        os.environ['SSL_CERT_FILE'] = path
        self.app.upstream = self.app.failover.upstream = cf.Upstream()
        events = stream_events('some text ' * 3000)
        whole = stream_bytes(events)
        for size in (50, 16_000, 100_000):
            self.serve_streams(
                lambda sock, size=size: sock.sendall(chunked(*pieces(whole, size)) + b'0\r\n\r\n'),
                lambda sock: context.wrap_socket(sock, server_side=True), 'https://localhost')
            for _ in range(2):
                answered = self.stream()
                self.assertEqual((len(answered.events), answered.is_complete), (len(events), True))
            self.assertEqual(self.server.connections, 1)    # its socket waits again, as others do

    def test_an_error_inside_is_raised_in_the_streams_own_thread(self):
        self.serve_streams(lambda sock: [sock.sendall(chunked(piece))
                                         for piece in pieces(stream_bytes(), 100)])
        with mock.patch.object(cf.MessageStream, 'last', side_effect=ZeroDivisionError), \
                mock.patch.object(cf.Carried, 'pass_on',
                                  lambda carried: setattr(carried, 'error', ZeroDivisionError())):
            self.stream()
        self.stop()
        self.assertEqual([line['kind'] for line in self.log_lines('internal_error')],
                         ['ZeroDivisionError'])


# ==============================================================================
# Faults of upstreams
# ==============================================================================
# Played in turn and under load here, for seconds; .ci/soak plays them to real clients, for
# minutes.

class GoodAnswer:
    """The answer that a request should get; its text repeats what was asked, so that one can tell
    whose it is.  `head` and `parts` are what is sent; `begun` is about half of it."""

    def __init__(self, body):
        asked = body['messages'][0]['content']
        text = asked if isinstance(asked, str) else asked[0]['text']
        self.is_stream = bool(body.get('stream'))
        if self.is_stream:
            self.head, self.end = STREAM_HEAD, b'0\r\n\r\n'
            self.pieces = list(map(cf.event_bytes, stream_events(text * 5)))
            self.parts = list(map(chunked, self.pieces))
        else:
            message = {**MESSAGE, 'content': [{'type': 'text', 'text': text * 5}]}
            self.pieces = self.parts = pieces(json.dumps(message).encode(), 40)
            self.head = (f'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n'
                         f'content-length: {len(b"".join(self.parts))}\r\n\r\n'.encode())
            self.end = b''
        self.begun = self.head + b''.join(self.parts[:len(self.parts) // 2])
        self.data = self.head + b''.join(self.parts) + self.end

    def framed(self, version, fields):
        """The same with a body of another framing."""
        kind = 'text/event-stream' if self.is_stream else 'application/json'
        return (f'HTTP/{version} 200 OK\r\ncontent-type: {kind}\r\n{fields}\r\n'.encode()
                + b''.join(self.pieces))


STALE = GoodAnswer(messages_body(messages=[{'role': 'user', 'content': 'stale '}])).data
ABSURD_HINTS = ('-5', '99999999999', 'nan', 'inf', '1e9', '', 'x' * 1000,
                'Fri, 31 Dec 9999 23:59:59 GMT', '\u0663', '5, 5', '0x10')


def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))


def stall(sock):
    """Says nothing more until the other side has enough of it."""
    sock.recv(1)


def drip(sock, data):
    """Sends a byte each time that the other side has said nothing for a moment, until it hangs
    up."""
    sock.settimeout(0.01)
    for byte in pieces(data, 1):
        sock.sendall(byte)
        with contextlib.suppress(socket.timeout):
            return sock.recv(1)


def error_answer(status, type='api_error', fields=''):
    return plain_answer(json.dumps(api_error(type, 'of the upstream')).encode(), status,
                        'content-type: application/json\r\n' + fields)


#: name: (how it is played after a request, what a client of one key gets for a stream, and for a
#: plain request).  'whole'; a status and type; 'event TYPE' for an error that ends a stream;
#: 'cut'.  A player that returns true keeps its connection.
BAD_GATEWAY, TIMEOUT = '502 api_error', '504 timeout_error'
FAULTS = {
    'none': (lambda sock, good: sock.sendall(good.data) or True, 'whole', 'whole'),
    'reset before its head': (lambda sock, good: reset(sock), BAD_GATEWAY, BAD_GATEWAY),
    'closed before its head': (lambda sock, good: None, BAD_GATEWAY, BAD_GATEWAY),
    'closed within its head': (lambda sock, good: sock.sendall(good.head[:30]), BAD_GATEWAY,
                               BAD_GATEWAY),
    'reset in the middle': (lambda sock, good: sock.sendall(good.begun) or reset(sock),
                            'event api_error', BAD_GATEWAY),
    'closed in the middle': (lambda sock, good: sock.sendall(good.begun), 'event api_error',
                             BAD_GATEWAY),
    'closed before its first event': (lambda sock, good: sock.sendall(good.head), BAD_GATEWAY,
                                      BAD_GATEWAY),
    'a bad chunk': (lambda sock, good: sock.sendall(
        good.framed('1.1', 'transfer-encoding: chunked\r\n')), BAD_GATEWAY, BAD_GATEWAY),
    'a bad chunk behind others': (lambda sock, good: sock.sendall(STREAM_HEAD + chunked(
        b''.join(good.pieces[:4])) + b'-5\r\nhello\r\n'), BAD_GATEWAY, BAD_GATEWAY),
    'a length that is too long': (lambda sock, good: sock.sendall(
        good.framed('1.1', 'content-length: 99999\r\n')), 'whole', BAD_GATEWAY),
    'two lengths': (lambda sock, good: sock.sendall(good.framed(
        '1.1', 'content-length: 9\r\ncontent-length: 8\r\n')), BAD_GATEWAY, BAD_GATEWAY),
    'silent before its head': (lambda sock, good: stall(sock), TIMEOUT, TIMEOUT),
    'a head that drips': (lambda sock, good: drip(sock, good.head[:17] + b'a: ' + b'x' * 1000),
                          TIMEOUT, TIMEOUT),
    'interim answers that drip': (
        lambda sock, good: drip(sock, b'HTTP/1.1 102 Processing\r\n\r\n' * 20), TIMEOUT, TIMEOUT),
    'silent in the middle': (lambda sock, good: sock.sendall(good.begun) or stall(sock),
                             'event api_error', TIMEOUT),
    'interim answers': (lambda sock, good: sock.sendall(
        b'HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n'
        + good.data) or True, 'whole', 'whole'),
    'endless interim answers': (lambda sock, good: sock.sendall(
        b'HTTP/1.1 103 Early Hints\r\n\r\n' * 40), BAD_GATEWAY, BAD_GATEWAY),
    'another protocol': (lambda sock, good: sock.sendall(
        b'HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n'), BAD_GATEWAY, BAD_GATEWAY),
    'no HTTP at all': (lambda sock, good: sock.sendall(b'SSH-2.0-OpenSSH_9.6\r\n\r\n'),
                       BAD_GATEWAY, BAD_GATEWAY),
    'HTTP/1.0 without a length': (lambda sock, good: sock.sendall(good.framed('1.0', '')), 'whole',
                                  'whole'),
    'an answer that nobody asked for': (lambda sock, good: sock.sendall(good.data + STALE) or True,
                                        'whole', 'whole'),
    'a 408 on an idle connection': (
        lambda sock, good: sock.sendall(good.data + b'HTTP/1.1 408 Request Timeout\r\nconnection: '
                                        b'close\r\ncontent-length: 0\r\n\r\n'), 'whole', 'whole'),
    'a huge head': (lambda sock, good: sock.sendall(b'HTTP/1.1 200 OK\r\na: ' + b'x' * 200_000
                                                    + b'\r\n' + good.data[17:]),
                    BAD_GATEWAY, BAD_GATEWAY),
    'too many fields': (lambda sock, good: sock.sendall(b'HTTP/1.1 200 OK\r\n' + b'a: b\r\n' * 200
                                                        + good.data[17:]),
                        BAD_GATEWAY, BAD_GATEWAY),
    'an error as its first event': (
        lambda sock, good: sock.sendall(STREAM_HEAD + chunked(cf.event_bytes(OVERLOADED_EVENT))
                                        + b'0\r\n\r\n') or True, '529 overloaded_error', 'whole'),
    'an error in the middle': (lambda sock, good: sock.sendall(
        STREAM_HEAD + chunked(*good.pieces[:4], cf.event_bytes(OVERLOADED_EVENT))
        + b'0\r\n\r\n') or True, 'event overloaded_error', 'whole'),
    **{f'429 with retry-after {hint[:40]!r}': (
        lambda sock, good, hint=hint: sock.sendall(
            error_answer('429 Too Many Requests', 'rate_limit_error', 'retry-after: ').replace(
                b'retry-after: ', b'retry-after: %b\r\n' % hint.encode())) or True,
        '429 rate_limit_error', '429 rate_limit_error') for hint in ABSURD_HINTS},
    '500': (lambda sock, good: sock.sendall(error_answer('500 Internal Server Error')) or True,
            BAD_GATEWAY, BAD_GATEWAY),
    '503 of another program': (lambda sock, good: sock.sendall(plain_answer(
        b'<html>\xff', '503 x', 'content-type: text/html\r\n')), BAD_GATEWAY, BAD_GATEWAY),
    '529': (lambda sock, good: sock.sendall(error_answer('529 x', 'overloaded_error')) or True,
            '529 overloaded_error', '529 overloaded_error'),
    'byte by byte': (lambda sock, good: [sock.sendall(piece) for piece in pieces(good.data, 1)],
                     'whole', 'whole'),
}
#: Plain requests are answered by what a stream is; nothing says that this is a fault.
NOT_OF_PLAIN_REQUESTS = ('an error as its first event', 'an error in the middle',
                         'a bad chunk behind others')


class FaultyUpstream:
    """A Messages API whose every answer plays one of FAULTS: `choose()` gives its name."""

    def __init__(self, test, choose):
        self.choose = choose
        self.server = RawServer(test, self._play)
        self.url = self.server.url

    def _play(self, sock, number):
        goes_on = True
        while goes_on:
            request = read_request(sock)
            goes_on = request and FAULTS[self.choose()][0](sock,
                                                           GoodAnswer(json.loads(request[1])))


def describe_answer(data, asked):
    """What a client got, in the words of FAULTS; an assertion fails for what it must not get."""
    answered = Answered(data)
    if answered.status != 200:
        assert answered.json['type'] == 'error' and answered.error['message'], data
        return f'{answered.status} {answered.error["type"]}'
    if 'text/event-stream' not in answered.headers['content-type']:
        if (len(answered.body) < int(answered.headers.get('content-length', 1 << 60))
            and not answered.is_complete):
            return 'cut'
        if len(answered.body) < int(answered.headers.get('content-length', 0)):
            return 'cut'
        assert answered.json['content'][0]['text'] == asked * 5, data
        return 'whole'
    events = answered.events
    kinds = [event['type'] for event in events]
    text = ''.join(event['delta'].get('text', '') for event in events
                   if event['type'] == 'content_block_delta')
    assert (asked * 5).startswith(text), data
    assert kinds.count('message_start') == 1, data
    if kinds[-1] == 'error':
        assert 'message_stop' not in kinds, data
        return f'event {events[-1]["error"]["type"]}'
    assert text == asked * 5 and kinds[-1] == 'message_stop' and answered.is_complete, data
    return 'whole'


class FaultsTest(ProgramTest):
    def setUp(self):
        self.threads = set(threading.enumerate())
        for name, seconds in (('STREAM_FIRST_BYTE_S', 0.2), ('OTHER_FIRST_BYTE_S', 0.2),
                              ('FIRST_BYTE_S', 0.2), ('STREAM_IDLE_S', 0.2), ('WATCH_S', 0.01)):
            patch = mock.patch.object(cf, name, seconds)
            patch.start()
            self.addCleanup(patch.stop)
        super().setUp()
        self.app.failover.jitter = lambda low, high: 0

    def use(self, upstream, *keys, **changes):
        # A hint may rest a key for this long at the most: other faults want their turn.
        self.reload(make_document(*keys, anthropicBaseUrl=upstream.url, cooldownMs=20,
                                  queueWaitMs=0, modelFallback={}, **changes))

    def ask(self, asked, stream):
        body = messages_body(stream=stream, messages=[{'role': 'user', 'content': asked}])
        return describe_answer(self.raw(request_bytes(body=body, connection='close')), asked)

    def test_each_fault_alone_has_its_clear_outcome(self):
        upstream = FaultyUpstream(self, None)
        self.use(upstream, 'a')
        for name, (_, of_stream, of_plain) in FAULTS.items():
            upstream.choose = lambda name=name: name
            for stream, expected in ((True, of_stream), (False, of_plain)):
                if not stream and name in NOT_OF_PLAIN_REQUESTS:
                    continue
                with self.subTest(name, stream=stream):
                    self.app.cooldowns.clear()
                    self.app.upstream.close_idle()
                    self.assertEqual(self.ask(f'{name}. ', stream), expected)

    def test_a_fault_before_the_first_event_is_the_next_keys_turn(self):
        names = []
        upstream = FaultyUpstream(self, lambda: names.pop(0) if names else 'none')
        self.use(upstream, 'a', 'b')
        for name, (_, of_stream, of_plain) in FAULTS.items():
            for stream, alone in ((True, of_stream), (False, of_plain)):
                if (alone.startswith('event') or alone == 'cut' or not stream
                    and name in NOT_OF_PLAIN_REQUESTS):
                    continue
                with self.subTest(name, stream=stream):
                    self.app.cooldowns.clear()
                    self.app.upstream.close_idle()
                    names[:] = [name]
                    # After a long silence the request may still be running, and be paid for.
                    self.assertEqual(self.ask(f'{name}. ', stream),
                                     alone if alone == TIMEOUT else 'whole')

    def test_under_load_every_client_gets_an_answer_or_a_clear_error_and_nothing_is_left(self):
        chance = random.Random(6)
        upstream = FaultyUpstream(self, lambda: chance.choice(list(FAULTS))
                                  if chance.random() < 0.7 else 'none')
        with socket.create_server(('127.0.0.1', 0)) as closed:
            refusing = f'http://127.0.0.1:{closed.getsockname()[1]}'
        keys = {id: {'token': token_of(id)} for id in 'abc'}
        keys['d'] = {'token': token_of('d'), 'baseUrl': refusing}
        self.use(upstream, 'd', 'a', 'b', 'c', keys=keys)
        outcomes, problems = queue.Queue(), []

        def run(number):
            for turn in range(15):
                try:
                    self.app.cooldowns.clear()    # every fault shall have its turn
                    outcomes.put(self.ask(f'client {number}, turn {turn}. ',
                                          (number + turn) % 3 > 0))
                except Exception as error:        # told by the assertion below
                    problems.append(error)
        before = self.open_files()
        threads = [threading.Thread(target=run, args=(number,), daemon=True)
                   for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(6 * PATIENCE_S)
        self.assertEqual((problems, sum(thread.is_alive() for thread in threads)), ([], 0))
        counts = collections.Counter(outcomes.queue)
        self.assertEqual(sum(counts.values()), 12 * 15)
        self.assertGreater(counts['whole'], 90, counts)
        self.assertLess({outcome for outcome in counts if not outcome.startswith(
            ('event ', '502 ', '429 ', '529 ', '504 '))}, {'whole', 'cut', 'x'})
        self.check_nothing_is_left(upstream, before)

    def test_many_connections_in_a_row_leave_nothing(self):
        upstream = FaultyUpstream(self, lambda: 'none')
        self.use(upstream, 'a')
        request = request_bytes('GET', '/health')

        def visit(data=b'', answer_bytes=0, is_reset=False):
            with connect(self.port) as sock:
                sock.sendall(data)
                self.assertEqual(len(sock.recv(answer_bytes)), answer_bytes)
                if is_reset:
                    reset(sock)
        self.ask('once. ', True)
        before = self.open_files()
        for _ in range(60):
            visit()                   # and leave
            visit(request[:-2])       # within the head
            visit(request, 9)         # within the answer
            visit(request, 9, is_reset=True)
            visit(b'nonsense\r\n\r\n', 9)
        self.assertEqual(self.ask('again. ', True), 'whole')
        self.check_nothing_is_left(upstream, before)

    def open_files(self):
        self.app.upstream.close_idle()
        self.app.log.info('counted')
        self.app.log.flush()          # its file is open from the first line on
        return len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else 0

    def check_nothing_is_left(self, upstream, open_files):
        for _ in range(cf.MAX_CONNECTIONS):  # a connection gives its slot back when it has ended
            self.assertTrue(self.app.slots.acquire(timeout=PATIENCE_S))
        self.app.upstream.close_idle()
        upstream.server.end()
        # Watched requests, dashboards, waiting requests, carried streams, files.
        self.assertEqual((len(self.app.watcher), len(self.app.bus.subscriptions),
                          self.app.cooldowns.queue_length(),
                          len(self.app.carrier._selector.get_map()),
                          max(0, self.open_files() - open_files)), (0,) * 5)
        workers = [thread for thread in set(threading.enumerate()) - self.threads
                   if thread.name == 'worker']
        self.assertLessEqual(len(workers), cf.IDLE_WORKERS)


# ==============================================================================
# API
# ==============================================================================

class ApiTest(ProgramTest):
    """What the dashboard and scripts use; the Node program's scripts among them."""

    def call(self, method, path, body=None, status=200, **fields):
        """The JSON that a request is answered with."""
        answered = self.send(method, path, b'' if body is None else body, **fields)
        self.assertEqual(answered.status, status, answered.body)
        self.assertNotIn(b'0123456789', answered.body)
        return answered.json

    def refused(self, method, path, body, status=400, **fields):
        """(field, message) of the error, having seen that nothing was saved."""
        before = self.read_config()
        error = self.call(method, path, body, status, **fields)['error']
        self.assertEqual(self.read_config(), before)
        return error.get('field'), error['message']

    def orders(self, name='default'):
        return list(self.app.store.current.profiles[name].order)

    def test_a_token_of_another_type_gives_its_key_that_type(self):
        for token, type in (('sk-ant-oat01-' + 'x' * 40, 'oauth'), (token_of('fresh'), 'api-key')):
            self.call('PUT', '/api/keys/a', {'token': token})
            self.assertEqual((self.read_config()['keys']['a']['type'],
                              self.call('GET', '/api/keys')['keys'][0]['type']), (type, type))

    def test_the_api_and_the_server_use_nothing_of_the_program_but_its_declared_parts(self):
        source = source_of('claude_failover.py')
        used = set(re.findall(r'\bapp\.(\w+)',
                              source[source.index('\n# API\n'):source.index('\n# Service\n')]))
        self.assertEqual(used, set(cf.Parts.__annotations__))
        self.assertEqual([name for name in used if not hasattr(self.app, name)], [])

    def test_keys_are_added_listed_changed_tested_and_removed(self):
        added = self.call('POST', '/api/keys',
                          {'token': token_of('c'), 'label': 'My <b>Key</b>'}, 201)
        self.assertEqual((added['id'], added['masked'], added['type'], added['requests'],
                          added['inCooldown']),
                         ('my-b-key-b', 'sk-ant-api...cdef', 'api-key', 0, False))
        self.assertEqual([key['id'] for key in self.call('GET', '/api/keys')['keys']],
                         ['a', 'b', 'my-b-key-b'])
        changed = self.call('PUT', '/api/keys/my-b-key-b',
                            {'label': 'Other', 'token': token_of('d')})
        self.assertEqual((changed['label'], self.read_config()['keys']['my-b-key-b']['token']),
                         ('Other', token_of('d')))
        self.anthropic.refused.add('d')
        tested = self.call('POST', '/api/keys/my-b-key-b/test', {})
        self.assertEqual((tested['valid'], tested['status'], tested['message']),
                         (False, 401, 'bad key'))
        self.assertEqual(self.call('POST', '/api/keys/a/test', b'')['valid'], True)
        self.assertTrue(self.call('DELETE', '/api/keys/my-b-key-b')['success'])
        self.assertEqual(list(self.read_config()['keys']), ['a', 'b'])
        openai = self.call('POST', '/api/openai-keys',
                           {'token': openai_token_of('x'), 'label': 'o',
                            'baseUrl': 'http://localhost:9/v1'}, 201)
        self.assertEqual((openai['ref'], openai['base_url']),
                         ('openai:o', 'http://localhost:9/v1'))
        self.assertTrue(self.read_config()['openaiModelFallback'])
        self.assertEqual(self.call('POST', '/api/openai-keys/o/test')['status'], 0)
        self.stop()
        events = [(line['event'], line.get('key'))
                  for name in ('key_added', 'key_changed', 'key_removed')
                  for line in self.log_lines(name)]
        self.assertEqual(events, [('key_added', 'anthropic:my-b-key-b'), ('key_added', 'openai:o'),
                                  ('key_changed', 'anthropic:my-b-key-b'),
                                  ('key_removed', 'anthropic:my-b-key-b')])

    def test_a_wrong_body_names_the_field_and_saves_nothing(self):
        self.reload(make_document('a', 'b', anthropicBaseUrl=self.anthropic.url,
                                  **with_openai('o')))
        for method, path, body, status, field in (
                ('POST', '/api/keys', {}, 400, 'token'),
                ('POST', '/api/keys', {'token': ''}, 400, 'token'),
                ('POST', '/api/keys', {'token': 5}, 400, 'token'),
                ('POST', '/api/keys', {'token': token_of('a')}, 400, 'token'),
                ('POST', '/api/keys', {'token': openai_token_of('a')}, 400, 'token'),
                ('POST', '/api/keys', {'token': token_of('x'), 'label': 5}, 400, 'label'),
                ('POST', '/api/keys', {'token': token_of('x'), 'label': token_of('y')}, 400,
                 'label'), ('POST', '/api/keys', {'token': token_of('x'), 'baseUrl': 'ftp://x'},
                            400, 'baseUrl'), ('POST', '/api/keys', {'token': 'a b'}, 400, 'token'),
                ('POST', '/api/openai-keys', {'token': token_of('x')}, 400, 'token'),
                ('POST', '/api/keys', {'tokne': 'x'}, 400, 'tokne'),
                ('POST', '/api/keys', b'[1]', 400, None), ('POST', '/api/keys', b'{', 400, None),
                ('POST', '/api/keys', b'[' * 100_000, 400, None),
                ('PUT', '/api/keys/nope', {'label': 'x'}, 404, None),
                ('PUT', '/api/keys/o', {'label': 'x'}, 404, None),
                ('DELETE', '/api/openai-keys/a', None, 404, None),
                ('PUT', '/api/keys/a', {'token': token_of('b')}, 400, 'token'),
                ('PUT', '/api/keys/a', {'token': ''}, 400, 'token'),
                ('PUT', '/api/keys/a', {'baseUrl': 'nonsense'}, 400, 'baseUrl'),
                ('POST', '/api/keys/nope/test', {}, 404, None),
                ('PUT', '/api/keys/reorder', {'keyOrder': ['a', 'x']}, 400, 'keyOrder'),
                ('PUT', '/api/keys/reorder', {}, 400, 'keyOrder'),
                ('PUT', '/api/keys/reorder', {'keyOrder': 'a'}, 400, 'keyOrder'),
                ('PUT', '/api/keys/reorder', {'keyOrder': ['a'], 'profile': 'x'}, 404, 'profile'),
                ('PUT', '/api/profiles/priority', {'priorityOrder': ['a']}, 400, 'priorityOrder'),
                ('PUT', '/api/profiles/priority', {'profile': 'default'}, 400, 'priorityOrder'),
                ('POST', '/api/profiles', {}, 400, 'name'),
                ('POST', '/api/profiles', {'name': 'default'}, 400, 'name'),
                ('POST', '/api/profiles', {'name': ''}, 400, 'name'),
                ('POST', '/api/profiles', {'name': 'x\x1b'}, 400, 'name'),
                ('POST', '/api/profiles', {'name': 'priority'}, 400, 'name'),
                ('POST', '/api/profiles', {'name': 'x', 'port': '4'}, 400, 'port'),
                ('POST', '/api/profiles', {'name': 'x', 'port': 70000}, 400, 'port'),
                ('POST', '/api/profiles', {'name': 'x', 'port': self.anthropic.server_port}, 409,
                 'port'),
                ('POST', '/api/profiles', {'name': 'x', 'keyOrder': ['nope']}, 400, 'keyOrder'),
                ('PUT', '/api/profiles/nope', {'port': 5000}, 404, 'profile'),
                ('PUT', '/api/profiles/default', {'port': self.anthropic.server_port}, 409,
                 'port'), ('PUT', '/api/profiles/default', {'port': True}, 400, 'port'),
                ('DELETE', '/api/profiles/nope', None, 404, 'profile'),
                ('DELETE', '/api/profiles/default', None, 409, None),
                ('PUT', '/api/config', {'queueWaitMs': 'x'}, 400, 'queueWaitMs'),
                ('PUT', '/api/config', {'queueWaitMs': 5, 'logLevel': 'loud'}, 400, 'logLevel'),
                ('PUT', '/api/config', {'nope': 1}, 400, 'nope'),
                ('PUT', '/api/config', {'keys': {}}, 400, 'keys'),
                ('PUT', '/api/config', {'tokens': []}, 400, 'tokens'),
                ('PUT', '/api/config', {'accessToken': 'a b'}, 400, 'accessToken'),
                ('PUT', '/api/config', {'modelFallback': {'a*b': 'c'}}, 400, 'modelFallback'),
                ('GET', '/api/logs?count=x', None, 400, 'count'),
                ('GET', '/api/logs?level=x', None, 400, 'level'),
                ('GET', '/api/keys?profile=x', None, 404, 'profile'),
                ('POST', '/api/setup/emacs', {}, 404, None),
                ('POST', '/api/setup/zsh', {'undo': 'yes'}, 400, 'undo'),
                ('POST', '/api/setup/zsh', {'profile': 'x'}, 404, 'profile'),
                ('POST', '/api/login', {}, 400, 'token'), ('PUT', '/api/status', {}, 405, None),
                ('PATCH', '/api/keys/a', None, 405, None)):
            with self.subTest(method=method, path=path, body=body):
                named, message = self.refused(method, path, body, status)
                self.assertEqual(named, field, message)
                self.assertGreater(len(message), 10)

    def test_keys_are_put_in_order_in_one_profile(self):
        document = make_document('a', 'b', 'c', anthropicBaseUrl=self.anthropic.url,
                                 **with_openai('o', 'p'))
        document['profiles'] = {'default': {'port': self.port}, 'mixed': {
            'port': free_port(),
            'priorityOrder': ['anthropic:b', 'openai:o', 'client', 'anthropic:a']}}
        self.reload(document)
        self.call('PUT', '/api/keys/reorder', {'profile': 'mixed', 'keyOrder': ['c', 'a']})
        self.assertEqual(self.orders('mixed'), ['anthropic:c', 'openai:o', 'client', 'anthropic:a',
                                                'anthropic:b', 'openai:p'])
        self.assertEqual(self.orders(),
                         ['anthropic:a', 'anthropic:b', 'anthropic:c', 'openai:o', 'openai:p'])
        self.call('PUT', '/api/openai-keys/reorder',
                  {'profile': 'default', 'openaiKeyOrder': ['p', 'o']})
        self.call('PUT', '/api/keys/reorder', {'keyOrder': ['b', 'b', 'a']})
        self.assertEqual(self.orders(),
                         ['anthropic:b', 'anthropic:a', 'anthropic:c', 'openai:p', 'openai:o'])
        self.assertEqual([key['id']
                          for key in self.call('GET', '/api/keys?profile=mixed')['keys']],
                         ['c', 'a', 'b'])
        self.call('PUT', '/api/profiles/priority',
                  {'profile': 'default', 'priorityOrder': ['openai:o', 'anthropic:c', 'client']})
        self.assertEqual(self.orders()[:4], ['openai:o', 'anthropic:c', 'client', 'anthropic:a'])
        profile = self.read_config()['profiles']['default']           # for the Node program
        self.assertEqual((profile['keyOrder'], profile['openaiKeyOrder']),
                         (['c', 'a', 'b'], ['o', 'p']))
        self.assertEqual(self.send().headers['x-proxy-key'], 'c')

    def test_profiles_are_made_used_renamed_moved_and_removed(self):
        port = free_port()
        made = self.call('POST', '/api/profiles',
                         {'name': 'second', 'port': port, 'keyOrder': ['b']}, 201)
        self.assertEqual((made['name'], made['port'], made['priorityOrder']),
                         ('second', port, ['anthropic:b', 'anthropic:a']))
        self.assertEqual(self.send(port=port, host='localhost').headers['x-proxy-key'], 'b')
        self.call('PUT', '/api/profiles/second',
                  {'name': 'Zwei / \u00fc', 'priorityOrder': ['anthropic:a']})
        self.assertEqual(self.send(port=port, host='localhost').headers['x-proxy-key'], 'a')
        moved = free_port()
        self.call('PUT', '/api/profiles/Zwei%20%2F%20%C3%BC', {'port': moved})
        self.call('PUT', '/api/profiles/default', {'name': ''})       # no other name
        self.assertEqual(self.app.ports(), {'default': self.port, 'Zwei / \u00fc': moved})
        self.assertEqual([p['name'] for p in self.call('GET', '/api/profiles')['profiles']],
                         ['default', 'Zwei / \u00fc'])
        self.assertEqual(self.refused('DELETE', '/api/profiles/Zwei%20%2F%20%C3%BC', None, 409,
                                      port=moved, host='localhost')[0], None)
        self.call('DELETE', '/api/profiles/Zwei%20%2F%20%C3%BC')
        self.assertEqual(self.app.ports(), {'default': self.port})

    def test_an_edit_that_is_done_again_is_the_same_edit(self):
        """The file changes while a profile gets its order: the edit is applied to the new one."""
        edit_profile, earlier = cf.edit_profile, []

        def meanwhile(config, *arguments):
            earlier.append(earlier or os.utime(self.path, ns=(0, 0)))
            return edit_profile(config, *arguments)
        with mock.patch.object(cf, 'edit_profile', meanwhile):
            self.call('PUT', '/api/profiles/default',
                      {'priorityOrder': ['anthropic:b', 'anthropic:a']})
        self.assertEqual(self.orders(), ['anthropic:b', 'anthropic:a'])
        self.app.log.flush()
        self.assertEqual(self.log_lines('profile_changed')[0]['fields'], ['priorityOrder'])

    def test_a_profile_without_a_port_gets_the_next_one(self):
        config = cf.parse_config({'profiles': {'a': {'port': 4080}, 'b': {'port': 4081}}})
        self.assertEqual(cf.add_profile(config, 'c').profiles['c'].port, 4082)
        self.assertEqual(cf.add_profile(cf.parse_config({}), 'c').profiles['c'].port, 4081)

    def test_settings_are_shown_and_changed_at_once(self):
        self.assertEqual(self.call('GET', '/api/config')['queueWaitMs'], 90_000)
        changed = self.call('PUT', '/api/config',
                            {'queueWaitMs': 5, 'logLevel': 'debug', 'modelFallback': {}})
        self.assertEqual((changed['queueWaitMs'], changed['modelFallback'],
                          self.app.store.current.queue_wait_ms), (5, {}, 5))
        self.assertEqual(self.call('PUT', '/api/config',
                                   {'queueWaitMs': None, 'cooldownMs': None})['queueWaitMs'],
                         90_000)
        self.assertNotIn('queueWaitMs', self.read_config())
        self.assertEqual(self.read_config()['logLevel'], 'debug')

    def test_a_token_that_a_server_quotes_in_a_keys_test_is_hidden(self):
        def quote(sock, number):
            token = re.search('(?i)x-api-key: (.*)', read_request(sock)[0].decode()).group(1)
            words = f'{token} is wrong, and so is {token_of("z")}'
            sock.sendall(plain_answer(
                json.dumps(api_error('authentication_error', words)).encode(), '401 x'))
        document = make_document('a', 'b', anthropicBaseUrl=RawServer(self, quote).url)
        document['keys']['b']['token'] = 'a-word-of-another-shape'
        self.reload(document)
        for id in 'ab':
            message = self.call('POST', f'/api/keys/{id}/test')['message']
            self.assertIn('is wrong, and so is sk-ant-api...cdef', message)
            self.assertNotIn('another-shape', message)
        self.stop()
        self.assertNotRegex(json.dumps(self.log_lines('key_tested')), '0123456789|another-shape')

    def test_a_token_goes_to_another_server_only_where_it_is_entered_again(self):
        document = make_document('a', 'b', anthropicBaseUrl=self.anthropic.url,
                                 **with_openai('o', openaiBaseUrl='http://localhost:9'))
        document['keys']['b']['baseUrl'] = 'http://localhost:8'
        document['keys']['e'] = {'token': 'env:SOME_TOKEN'}
        os.environ['SOME_TOKEN'] = token_of('e')
        self.reload(document)
        elsewhere = {'anthropicBaseUrl': 'http://localhost:7'}
        for tokens in ({}, {'anthropic:a': token_of('b')},
                       {'anthropic:a': token_of('a'), 'anthropic:e': 'env:SOME_TOKEN'},
                       {'anthropic:a': 'wr\u00f6ng'}):
            self.assertEqual(self.refused('PUT', '/api/config',
                                          {**elsewhere, 'tokens': tokens})[0], 'tokens')
        error = self.call('PUT', '/api/config', elsewhere, 400)['error']
        self.assertEqual(error['keys'], ['anthropic:a', 'anthropic:e'])
        self.call('PUT', '/api/config',
                  {**elsewhere,
                   'tokens': {'anthropic:a': token_of('a') + '\n', 'anthropic:e': token_of('e')}})
        self.assertEqual(self.app.store.current.anthropic_base_url, 'http://localhost:7')
        for key, body in (('keys/b', {'baseUrl': 'http://localhost:6'}),
                          ('keys/b', {'baseUrl': ''}),
                          ('keys/a', {'baseUrl': 'http://localhost:6'}),
                          ('openai-keys/o', {'baseUrl': 'http://localhost:6'})):
            self.assertEqual(self.refused('PUT', f'/api/{key}', body)[0], 'tokens')
        self.call('PUT', '/api/keys/b',
                  {'baseUrl': 'http://localhost:6', 'token': token_of('new')})
        self.call('PUT', '/api/keys/b', {'baseUrl': 'http://localhost:7', 'label': 'x'}, 400)
        self.call('PUT', '/api/openai-keys/o', {'label': 'x', 'baseUrl': 'http://localhost:9'})
        self.assertEqual(self.app.store.current.keys['openai:o'].base_url, 'http://localhost:9')

    def test_a_token_of_this_machine_goes_to_no_server_that_a_request_names(self):
        path = os.path.join(self.folder, 'token')
        with open(path, 'w') as file:
            file.write('sk-ant-oat01-' + 'x' * 40)
        os.environ['A_TOKEN'] = 'sk-ant-oat01-' + 'y' * 40
        document = make_document(anthropicBaseUrl='http://localhost:7',
                                 openaiBaseUrl='http://localhost:7',
                                 codexBaseUrl='http://localhost:7')
        document['keys'] = {'mine': {'token': 'sk-ant-api03-known-to-the-caller',
                                     'baseUrl': 'http://localhost:6'},
                            'set': {'token': 'env:SET', 'baseUrl': 'http://localhost:5'}}
        for token in (f'file:{path}', ' env:A_TOKEN', 'env:NOT_SET'):
            self.reload(document)
            for method, key, body in (('POST', 'keys', {'baseUrl': 'http://localhost:6'}),
                                      ('POST', 'keys', {}), ('POST', 'openai-keys', {}),
                                      ('POST', 'openai-keys', {'baseUrl': 'http://localhost:6'}),
                                      ('PUT', 'keys/mine', {}),
                                      ('PUT', 'keys/mine', {'baseUrl': ''}),
                                      ('PUT', 'keys/set', {})):
                with self.subTest(token=token, key=key, body=body):
                    field, message = self.refused(method, f'/api/{key}', {**body, 'token': token})
                    self.assertEqual(field, 'token')
                    self.assertRegex(message, 'add-(openai-)?key')
            self.call('PUT', '/api/keys/set', {'label': 'What is there already stays.'})
            self.reload({**document, 'anthropicBaseUrl': None, 'openaiBaseUrl': None,
                         'codexBaseUrl': None})
            self.assertEqual(self.call('POST', '/api/keys', {'token': token}, 201)['masked'],
                             token.strip())
            # To know what a file holds now is not enough.
            field = 'token' if 'file' in token else 'tokens'
            self.assertEqual(self.refused('PUT', '/api/keys/key', {'baseUrl': 'http://localhost:6',
                                                                   'token': token})[0], field)
            moved = {'anthropicBaseUrl': 'http://localhost:6',
                     'tokens': {'anthropic:key': 'sk-ant-oat01-' + 'x' * 40}}
            self.assertEqual(self.refused('PUT', '/api/config', moved)[0], field)

    def test_a_token_that_may_become_a_login_goes_to_no_other_server_of_logins_unasked(self):
        document = make_document()
        document['openaiKeys'] = {'o': {'token': 'env:NOT_SET'}}
        self.reload(document)
        self.assertEqual(self.refused('PUT', '/api/config',
                                      {'codexBaseUrl': 'http://localhost:6'})[0], 'tokens')

    def test_a_file_that_is_gone_is_made_whole_by_an_edit_and_that_is_logged_once(self):
        before = self.read_config()
        os.unlink(self.path)
        self.app.reload()
        for number in (5, 6):
            self.call('PUT', '/api/config', {'queueWaitMs': number})
        self.assertEqual(self.read_config(), {**before, 'queueWaitMs': 6})
        self.stop()
        self.assertEqual(['was gone' in line['message']
                          for line in self.log_lines('config_notice')], [True])

    def test_a_broken_file_is_not_overwritten(self):
        self.write_config('{ broken')
        answered = self.send('PUT', '/api/config', {'queueWaitMs': 5})
        self.assertEqual(answered.status, 400)
        self.assertIn('not valid JSON', answered.error['message'])
        with open(self.path) as file:
            self.assertEqual(file.read(), '{ broken')

    def test_a_full_disk_is_told_as_such_and_changes_nothing(self):
        with mock.patch('os.fsync', side_effect=OSError(28, 'No space left on device')):
            _, message = self.refused('POST', '/api/keys', {'token': token_of('new')}, 507)
        self.assertIn('No space left on device', message)
        self.assertNotIn('anthropic:new', self.app.store.current.keys)

    def test_the_status_tells_all_that_the_page_shows(self):
        self.anthropic.fields = [('anthropic-ratelimit-unified-5h-utilization', '0.42'),
                                 ('anthropic-ratelimit-unified-5h-reset', '4000000000'),
                                 ('anthropic-ratelimit-unified-5h-status', 'allowed'),
                                 ('anthropic-ratelimit-requests-limit', '50'),
                                 ('anthropic-ratelimit-requests-remaining', '10'),
                                 ('anthropic-ratelimit-requests-reset', '2001-01-01T00:00:00Z')]
        self.anthropic.limited.add('a')
        self.send()
        status = self.call('GET', '/api/status')
        self.assertEqual((status['profile'], status['profiles'][0]['url'], status['uptime']),
                         ('default', f'http://localhost:{self.port}', status['uptime_s']))
        self.assertEqual([(w['name'], w['used'], w['status'])
                          for w in status['keys'][1]['windows']],
                         [('5h', 0.42, 'allowed'), ('requests', 0.8, None)])
        self.assertIsNone(status['keys'][1]['windows'][0]['resets_at'])  # too far away to be true
        self.assertEqual(status['keys'][0]['ref'], 'anthropic:a')
        self.assertEqual(tuple(status['cooldowns'][0][name]
                               for name in ('ref', 'words', 'total_ms')),
                         ('anthropic:a', 'rate limit reached', 3_000_000))
        self.assertEqual([(m['answered'], m['rescued'], m['ttfb_p50_ms'] >= 0)
                          for m in status['history']], [(1, 1, True)])
        self.assertEqual((status['metrics']['by_provider'], status['metrics']['total'],
                          status['metrics']['retries']), ({'anthropic': 1}, 1, 1))
        self.assertRegex(status['recent'][0]['time'], r'^20\d\d-')

    def test_windows_tell_their_length_and_pace(self):
        now = time.time()
        for name, left_s in (('5h', 4 * 3600), ('7d', 86_400)):
            self.anthropic.fields += [(f'anthropic-ratelimit-unified-{name}-utilization', '0.5'), (
                f'anthropic-ratelimit-unified-{name}-reset', str(int(now + left_s)))]
        self.anthropic.fields += [('anthropic-ratelimit-requests-limit', '50'),
                                  ('anthropic-ratelimit-requests-remaining', '10')]
        self.send()
        windows = self.call('GET', '/api/status')['keys'][0]['windows']
        self.assertEqual([(w['name'], w['length_s'], w['pace'] and round(w['pace'], 1),
                           w['spent_at'] is not None) for w in windows],
                         [('5h', 18_000, 2.5, True), ('7d', 604_800, 0.6, False),
                          ('requests', 60, None, False)])

    def test_a_cooldown_tells_when_it_is_tried_again_and_when_the_limit_ends(self):
        self.reload(make_document('a', cooldownMs=60_000, anthropicBaseUrl=self.anthropic.url))
        self.anthropic.limited.add('a')
        self.app.store.current = self.app.store.current._replace(queue_wait_ms=0)
        self.send()
        cooldown = self.call('GET', '/api/status')['cooldowns'][0]
        ends_s, asked_s = (
            cf.unix_seconds(cf.datetime.fromisoformat(cooldown[name].replace('Z', '+00:00')))
            - time.time() for name in ('until', 'asked_at'))
        self.assertEqual((round(ends_s, -2), asked_s <= 60), (3000, True))

    def test_a_server_that_cools_is_named_and_with_it_all_its_keys(self):
        key = self.app.store.current.keys['anthropic:a']
        outcome = cf.Outcome(cf.UNREACHABLE._replace(strikes=1), None, 'no route', 60)
        self.app.cooldowns.cool(key, cf.Slot(key.ref, OPUS, server=self.anthropic.url),
                                outcome, 3600)
        status = self.call('GET', '/api/status')
        cooldown = status['cooldowns'][0]
        self.assertEqual((cooldown['key'], cooldown['ref'], cooldown['server'], cooldown['refs']),
                         (None, None, self.anthropic.url, ['anthropic:a', 'anthropic:b']))
        self.assertEqual([key['state'] for key in status['keys']], ['cooling', 'cooling'])

    def test_conversations_tell_where_they_are(self):
        self.assertEqual(self.call('GET', '/api/conversations'), {'conversations': []})
        session = {'x_claude_code_session_id': 'one', 'user_agent': 'claude-cli/2'}
        for _ in 'ab':
            self.send(**session)
        self.anthropic.limited.add('a')
        self.send(**session)
        [view] = self.call('GET', '/api/conversations')['conversations']
        self.assertEqual([view[name] for name in ('client', 'model', 'upstream_model', 'key',
                                                  'ref', 'turns', 'moves', 'why')],
                         ['claude-code', OPUS, OPUS, 'b', 'anthropic:b', 3, 1, 'rate_limited'])
        self.assertEqual((len(view['conversation']), 0 < view['cache_ms'] <= 3_600_000), (8, True))
        status = self.call('GET', '/api/status')
        self.assertEqual((status['conversation_count'],
                          [v['conversation'] for v in status['conversations']]),
                         (1, [view['conversation']]))
        self.assertEqual(cf.shown_ref('client:12ab'), {'ref': 'client', 'key': 'client'})

    def test_a_profiles_strategy_is_told_and_changed(self):
        self.assertEqual(self.call('GET', '/api/profiles')['profiles'][0]['strategy'], 'order')
        self.assertEqual(self.call('PUT', '/api/profiles/default',
                                   {'strategy': 'spread'})['strategy'], 'spread')
        self.assertEqual(self.call('GET', '/api/status')['profiles'][0]['strategy'], 'spread')
        self.assertEqual(self.refused('PUT', '/api/profiles/default', {'strategy': 'best'},
                                      400)[0], 'strategy')
        self.assertEqual(self.call('POST', '/api/profiles',
                                   {'name': 'x', 'port': free_port(), 'strategy': 'drain'},
                                   201)['strategy'], 'drain')
        self.assertEqual(self.read_config()['profiles']['default']['strategy'], 'spread')

    def test_keys_of_one_organization_are_told(self):
        self.anthropic.fields = [('anthropic-organization-id', 'org-1'),
                                 ('anthropic-ratelimit-requests-limit', '50'),
                                 ('anthropic-ratelimit-requests-remaining', '10')]
        for ref in ('anthropic:a', 'anthropic:b'):
            self.app.metrics.note_limits(ref, dict(self.anthropic.fields))
        self.assertEqual([key['siblings'] for key in self.call('GET', '/api/status')['keys']],
                         [['anthropic:b'], ['anthropic:a']])

    def test_the_status_tells_who_serves_each_model_in_use(self):
        serving = self.call('GET', '/api/status')['profiles'][0]['serving']
        self.assertEqual([(row['model'], row['state'], row['ref'], row['next']['ref'])
                          for row in serving], [(None, 'ready', 'anthropic:a', 'anthropic:b')])
        self.anthropic.limited.add('a')
        for model in (SONNET, OPUS, OPUS):
            self.send(body=messages_body(model=model))
        self.send(path='/v1/messages/count_tokens', body=messages_body(model='claude-counted'))
        for path in ('/health', '/api/status'):
            opus, sonnet = self.call('GET', path)['profiles'][0]['serving']
            self.assertEqual((opus['model'], opus['state'], opus['key'], opus['upstream_model'],
                              opus['back_in_ms']), (OPUS, 'ready', 'b', OPUS, None))
            self.assertEqual(([passed['ref'] for passed in opus['passed']],
                              opus['next']['upstream_model']), (['anthropic:a'], SONNET))
            self.assertEqual((sonnet['model'], sonnet['ref']), (SONNET, 'anthropic:b'))

    def test_models_in_use_are_those_of_the_last_requests(self):
        document = make_document('a')
        document['profiles']['second'] = {'port': 1}
        config = cf.parse_config(document)

        def in_use(name, *requests):
            recent = [{'profile': profile, 'model': model, 'path': path, 'status': status,
                       'attempts': []} for profile, model, path, status in requests]
            return [row['model'] for row in cf.profile_serving(config, config.profiles[name],
                                                               recent, [], set())]
        opus, sonnet, typo = (('default', model, cf.MESSAGES_PATH, status) for model, status in (
            (OPUS, 200), (SONNET, 429), ('claude-typo', 404)))
        counted, bare = (('default', 'claude-counted', cf.COUNT_TOKENS_PATH, 200),
                         ('default', None, cf.MESSAGES_PATH, 400))
        self.assertEqual(in_use('default', sonnet, opus, typo, counted, opus, bare),
                         [OPUS, SONNET])
        self.assertEqual(in_use('second', opus), [OPUS])
        self.assertEqual(in_use('default', typo), [None])
        self.assertEqual(len(in_use('default', *(('default', f'model-{n}', cf.MESSAGES_PATH, 200)
                                                 for n in range(9)))), cf.MODELS_IN_USE)

    def test_it_is_exhausted_when_no_key_of_either_provider_may_be_used(self):
        openai = PretendOpenAI(self)
        document = {**make_document('a', anthropicBaseUrl=self.anthropic.url),
                    **with_openai('o', openaiBaseUrl=openai.url, queueWaitMs=0)}
        self.reload(document)
        self.anthropic.limited.add('a')
        self.send()
        self.assertEqual(self.call('GET', '/health')['status'], 'ok')   # OpenAI answers for Claude
        key = self.app.store.current.keys['openai:o']
        self.app.cooldowns.cool(key, cf.Slot(key.ref, 'gpt-5.4'),
                                cf.Outcome(rule('rate_limited'), 429, 'slow down', 50), 3600)
        status = self.call('GET', '/api/status')
        row = status['profiles'][0]['serving'][0]
        self.assertEqual((status['status'], row['state'], row['ref']),
                         ('exhausted', 'cooling', 'openai:o'))
        self.assertTrue(0 < row['back_in_ms'] <= 50_000)
        self.app.update(lambda config: cf.change_settings(config, {'openaiModelFallback': False}))
        self.assertEqual([key['state'] for key in self.call('GET', '/health')['keys']],
                         ['limited', 'unused'])
        document['keys'], document['openaiModelFallback'] = {}, True
        document['openaiKeys']['o']['token'] = 'env:IT_IS_NOT_SET'
        document['profiles']['default'].pop('keyOrder')
        self.reload(document)
        health = self.call('GET', '/health')
        self.assertEqual((health['status'], health['profiles'][0]['serving'][0]['state']),
                         ('exhausted', 'unusable'))

    def read_event_stream(self, wanted, act=lambda: None, **fields):
        """[(event, data), ...] of /api/events up to one whose name and data `wanted` takes."""
        with connect(self.port) as sock:
            sock.sendall(request_bytes('GET', '/api/events', **fields))
            with sock.makefile('rb') as file:
                self.assertIn(b'200', file.readline())
                events, name, has_acted = [], None, False
                for line in file:
                    if line.startswith(b'event: '):
                        name = line[7:].strip().decode()
                    if not line.startswith(b'data: '):
                        continue
                    events.append((name, json.loads(line[6:])))
                    if name == 'status' and not has_acted:
                        has_acted = True
                        act()
                    if wanted(*events[-1]):
                        return events
        self.fail(f'the stream ended after {events}')

    def test_events_tell_what_happens_as_it_happens(self):
        self.anthropic.limited.add('a')
        told = set()  # in any order: the state is looked at, a request is told, a line is written

        def wanted(name, data):
            is_due = {'request': lambda: True, 'status': lambda: data['metrics']['requests'] > 0,
                      'log': lambda: data['event'] == 'cooldown'}.get(name, lambda: False)
            told.update({name} if is_due() else ())
            return told == {'request', 'status', 'log'}
        with mock.patch.object(cf, 'STATUS_S', 0.01):
            events = self.read_event_stream(wanted, self.send)
        self.assertEqual([name for name, _ in events][:2], ['config', 'status'])
        self.assertEqual(events[0][1]['settings']['queueWaitMs'], 90_000)
        self.assertEqual(events[1][1]['recent'], [])
        request = next(data for name, data in events if name == 'request')
        self.assertEqual([a['status'] for a in request['attempts']], [429, 200])
        self.assertNotIn('recent', [data for name, data in events if name == 'status'][-1])
        self.assertTrue(self.soon(lambda: not self.app.bus.subscriptions), 'it stays subscribed')

    def soon(self, is_so):
        """Whether something becomes so while others work."""
        deadline = time.monotonic() + PATIENCE_S
        while not is_so() and time.monotonic() < deadline:
            self.send()               # what is logged shows the server that nobody listens
        return is_so()

    def test_events_tell_of_a_changed_configuration(self):
        events = self.read_event_stream(
            lambda name, data: name == 'config' and data['settings']['queueWaitMs'] == 7,
            lambda: self.send('PUT', '/api/config', {'queueWaitMs': 7}))
        self.assertEqual(events[-1][1]['fields'][0]['name'], 'modelFallback')

    def test_a_stop_ends_the_events(self):
        with mock.patch.object(cf, 'STATUS_S', 0.01), \
                self.assertRaisesRegex(AssertionError, 'the stream ended'):
            self.read_event_stream(lambda name, data: False, self.app.stop)

    def test_a_dashboard_that_does_not_read_is_given_up(self):
        with self.app.bus.subscription() as slow:
            slow._news.not_full.wait = mock.Mock(side_effect=AssertionError('it was waited for'))
            for _ in range(cf.MAX_NEWS + 1):
                self.app.bus.publish('log', '{}')
            self.assertTrue(slow.is_over)
        self.assertEqual(self.app.bus.subscriptions, ())

    def test_a_state_that_only_grows_older_is_not_told_again(self):
        call = mock.Mock(profile_name='default')
        clock = FakeClock()
        call.app.health = lambda: {'uptime_s': clock.now, 'recent': [], 'cooldowns': [
            {'key': 'a', 'remaining_ms': clock.now, 'until': clock.now}]}
        call.app.metrics.history = lambda: []
        call.app.failover = mock.Mock(now=clock, clock=clock,
                                      conversations=cf.Conversations(clock))
        reporter = cf.StatusReporter(call, clock)
        self.assertIn(b'"recent"', reporter.news())
        for seconds, news in ((0.5, b''), (1, b''), (1, b''), (20, b': \n\n'), (1, b'')):
            clock.now += seconds
            self.assertEqual(reporter.news(), news)

    def test_logs_are_the_last_lines_of_a_level(self):
        for level in ('info', 'warn', 'error'):
            self.app.log.write(level, f'was_{level}')
        self.assertEqual([line['event'] for line in self.call('GET', '/api/logs?count=3')['logs']],
                         ['was_info', 'was_warn', 'was_error'])
        self.assertEqual([line['event']
                          for line in self.call('GET', '/api/logs?count=3&level=warn')['logs']],
                         ['was_warn', 'was_error'])
        self.assertEqual(self.call('GET', '/api/logs?count=0')['logs'], [])

    def test_last_lines_come_from_both_files_and_only_from_their_ends(self):
        path = os.path.join(self.folder, 'log')
        self.assertEqual(cf.last_lines(path, 5), [])
        for name, text in ((path + '.1', 'a\nb\n'), (path, 'c\nd\n')):
            with open(name, 'w') as file:
                file.write(text)
        self.assertEqual((cf.last_lines(path, 3), cf.last_lines(path, 2)),
                         ([b'b', b'c', b'd'], [b'c', b'd']))
        with mock.patch.object(cf, 'LOG_TAIL_BYTES', 3):
            self.assertEqual(cf.last_lines(path, 2), [b'b', b'd'])

    def test_tools_are_shown_set_up_and_given_back(self):
        zshrc = os.path.join(self.folder, '.zshrc')
        with open(zshrc, 'w') as file:
            file.write('mine\n')
        shown = self.call('GET', '/api/setup/status')
        self.assertEqual(list(shown),
                         ['claude-code', 'zsh', 'bash', 'fish', 'cursor', 'autostart'])
        self.assertEqual((shown['zsh']['installed'], shown['zsh']['configured'],
                          shown['zsh']['path']), (True, False, zshrc))
        self.assertIn('Cursor cannot', shown['cursor']['note'])
        done = self.call('POST', '/api/setup/zsh', {})
        self.assertEqual((done['changed'], done['message']), (
            1, f'zsh: ~/.zshrc now uses http://localhost:{self.port} (in new terminals).'))
        shown = self.call('GET', '/api/setup/status')['zsh']
        self.assertEqual((shown['configured'], shown['url']),
                         (True, f'http://localhost:{self.port}'))
        self.assertEqual(self.call('POST', '/api/setup/zsh')['changed'], 0)
        self.call('POST', '/api/setup/zsh', {'undo': True})
        with open(zshrc) as file:
            self.assertEqual(file.read(), 'mine\n')
        with mock.patch('shutil.which', return_value=None):       # no Claude Code
            self.assertEqual(self.call('POST', '/api/setup/auto', {})['actions'][0]['target'],
                             'zsh')
        os.makedirs(os.path.join(self.folder, '.claude'))
        with open(os.path.join(self.folder, '.claude', 'settings.json'), 'w') as file:
            file.write('{,')
        self.assertIn('~/.claude/settings.json is not valid JSON',
                      self.refused('POST', '/api/setup/claude-code', {}, 409)[1])
        self.assertIn('not valid JSON',
                      self.call('GET', '/api/setup/status')['claude-code']['note'])

    @needs('/proc')                   # Linux
    def test_the_start_at_login_leaves_the_running_proxy_alone(self):
        ran = []
        with mock.patch.object(cf, 'run_commands', ran.extend):
            done = self.call('POST', '/api/setup/autostart', {})
            self.assertEqual((done['changed'], done['message']),
                             (1, 'systemd starts it from the next login on.'))
            shown = self.call('GET', '/api/setup/status')['autostart']
            self.assertEqual((shown['installed'], shown['loaded'], shown['manager']),
                             (True, False, 'systemd'))
            self.call('POST', '/api/setup/remove-autostart', {})
        self.assertFalse(os.path.exists(shown['path']))
        self.assertNotIn('--now', json.dumps(ran))
        with mock.patch.object(cf, 'run_commands', lambda commands: 'no bus'):
            self.assertIn('cannot be reached here (no bus)',
                          self.call('POST', '/api/setup/autostart', {})['message'])

    def test_scripts_of_the_node_program_go_on_working(self):
        self.anthropic.limited.update('ab')
        self.send()
        self.assertEqual(self.call('POST', '/clear-cooldowns')['cleared'], 4)
        for method, path in (('POST', '/api/event_logging/batch'),
                             ('GET', '/api/claude_cli/bootstrap'), ('GET', '/api/oauth/profile'),
                             ('GET', '/api/keys/'), ('POST', '/api/keys/a/b/test')):
            self.assertEqual(self.send(method, path).status, 404)  # Claude Code's own, or nobody's

    def test_a_browser_is_let_in_by_the_access_token_or_a_code_that_is_good_once(self):
        self.reload(make_document('a', anthropicBaseUrl=self.anthropic.url,
                                  accessToken='open-sesame'))
        self.call('GET', '/api/status', status=401)
        self.assertEqual(self.refused('POST', '/api/login', {'token': 'wrong \u00fc'}, 401)[0],
                         'token')
        cookies = [self.send('POST', '/api/login', {'token': 'open-sesame'}).headers['set-cookie']]
        code = self.call('POST', '/api/login-code', b'', x_api_key='open-sesame')['code']
        let_in = self.send('GET', f'/dashboard?code={code}')
        self.assertEqual((let_in.status, let_in.headers['location']), (303, '/dashboard'))
        cookies.append(let_in.headers['set-cookie'])
        for cookie in cookies:
            self.assertRegex(cookie,
                             '^claude-failover=[0-9a-f]{64}; Path=/; HttpOnly; SameSite=Strict; ')
            pair = cookie.partition(';')[0]
            self.call('GET', '/api/status', cookie=f'other=1; {pair}')
            self.call('PUT', '/api/config', {'queueWaitMs': 5}, cookie=pair)
            self.assertEqual(self.send(cookie=pair).status, 401)    # it opens no other door
        for code in (code, '', 'x'):
            self.assertNotIn('set-cookie', self.send('GET', f'/dashboard?code={code}').headers)
        for cookie in ('claude-failover=', 'claude-failover=x', 'claude-failover=\xfc', pair[:-1]):
            self.call('GET', '/api/status', status=401, cookie=cookie)
        self.reload(make_document('a', anthropicBaseUrl=self.anthropic.url, accessToken='another'))
        self.call('GET', '/api/status', status=401, cookie=pair)

    def test_who_sets_an_access_token_is_not_locked_out_by_it(self):
        answered = self.send('PUT', '/api/config', {'accessToken': 'open-sesame'})
        self.assertEqual(answered.json['accessToken'], '...')
        self.assertEqual(self.send('GET', '/api/status',
                                   cookie=answered.headers['set-cookie'].partition(';')[0]).status,
                         200)
        self.assertEqual(self.send('GET', '/dashboard').status,
                         200 if os.path.exists(cf.DASHBOARD_PATH) else 404)

    def test_half_a_character_is_refused_by_its_field_and_makes_no_token(self):
        self.reload(make_document('a', 'b', anthropicBaseUrl=self.anthropic.url,
                                  accessToken='open-sesame'))
        self.assertEqual(self.call('POST', '/api/login', b'{"token": "\\ud800"}',
                                   401)['error']['field'], 'token')
        for method, path, body, field in (
                ('POST', '/api/keys',
                 b'{"token": "%s", "label": "\\ud800"}' % token_of('n').encode(), 'label'),
                ('POST', '/api/keys', b'{"token": "file:/\\ud800"}', 'token'),
                ('PUT', '/api/keys/a', b'{"label": "\\udc80"}', 'label'),
                ('POST', '/api/profiles', b'{"name": "\\ud800"}', 'name'),
                ('PUT', '/api/profiles/default', b'{"name": "\\ud800"}', 'name'),
                ('PUT', '/api/config', b'{"allowedHosts": ["\\ud800"]}', 'allowedHosts'),
                ('PUT', '/api/config', b'{"\\ud800": 1}', '\ud800'),
                ('PUT', '/api/config', b'{"modelFallback": {"\\ud800": "x"}}', 'modelFallback'),
                ('PUT', '/api/config', b'{"anthropicBaseUrl": "http://localhost:1", "tokens": '
                 b'{"anthropic:a": "\\ud800"}}', 'tokens')):
            with self.subTest(path=path, body=body):
                self.assertEqual(self.refused(method, path, body, x_api_key='open-sesame')[0],
                                 field)

    def test_a_login_code_lasts_a_minute(self):
        clock = FakeClock()
        codes = cf.LoginCodes(clock)
        first, second = codes.make(), codes.make()
        self.assertTrue(codes.use(first))
        clock.now += cf.LOGIN_CODE_S
        self.assertFalse(codes.use(second))

    def test_a_person_at_the_root_comes_to_the_dashboard_and_a_client_does_not(self):
        self.assertEqual(self.send('GET', '/', accept='text/html,*/*').headers['location'],
                         '/dashboard')
        self.assertEqual(self.send('GET', '/', accept='*/*').status, 200)

    def test_no_answer_of_the_api_opens_itself_to_another_site(self):
        for method, path in (('GET', '/api/status'), ('GET', '/api/config'),
                             ('PUT', '/api/config'), ('POST', '/api/keys')):
            self.assertEqual(self.send(method, path, {}, origin='https://evil.example').status,
                             403)
            if method != 'GET':
                self.assertEqual(self.send(method, path, {}, content_type='text/plain').status,
                                 415)


# ==============================================================================
# Service
# ==============================================================================

#: Holes between blocks that stay, 40 MB of them; how much of it the system gets back, in KB.
HOLES = '''
import sys
sys.path.insert(0, sys.argv[1])
import claude_failover as cf
def used():
    return int(open('/proc/self/status').read().split('VmRSS:')[1].split()[0])
blocks = [bytes(4000) for _ in range(10_000)]
blocks = blocks[::100]
before = used()
cf.return_memory()
print(before - used())
'''


class ServiceTest(ProgramTest):
    @unittest.skipUnless(platform.libc_ver()[0] == 'glibc', 'the C library is not to be told')
    def test_free_memory_goes_back_to_the_system(self):
        done = subprocess.run([sys.executable, '-c', HOLES, os.path.dirname(SCRIPT)],
                              capture_output=True, text=True, timeout=60)
        self.assertGreater(int(done.stdout), 30_000, done.stderr)

    def profiles(self, **ports):
        document = make_document('a', anthropicBaseUrl=self.anthropic.url)
        document['profiles'] = {name: {'port': port} for name, port in ports.items()}
        return document

    def health(self, port):
        return self.send('GET', '/health', port=port, host='localhost').json

    def test_profiles_appear_move_and_vanish_with_the_file(self):
        one, two = free_port(), free_port()
        self.reload(self.profiles(default=one, second=two))
        self.assertEqual(self.app.ports(), {'default': one, 'second': two})
        self.assertEqual(self.health(two)['status'], 'ok')
        self.reload(self.profiles(default=one))
        with self.assertRaises(ConnectionRefusedError):
            self.health(two)
        moved = free_port()
        self.reload(self.profiles(default=moved))
        self.assertEqual(self.health(moved)['profiles'][0]['port'], moved)
        self.reload(self.profiles(renamed=moved))
        self.assertEqual(self.health(moved)['profiles'][0]['name'], 'renamed')

    def test_a_running_answer_survives_the_end_of_its_profile(self):
        port = free_port()
        self.reload(self.profiles(default=self.port, second=port))
        self.anthropic.hold = threading.Event()
        answers = queue.Queue()
        threading.Thread(target=lambda: answers.put(self.send(port=port, host='localhost')),
                         daemon=True).start()
        self.assertTrue(self.anthropic.asked_for.acquire(timeout=PATIENCE_S))
        self.reload(self.profiles(default=self.port))
        self.anthropic.hold.set()
        self.assertEqual(answers.get(timeout=PATIENCE_S).status, 200)

    def test_a_port_that_is_taken_is_a_problem_until_it_is_free(self):
        with socket.create_server(('127.0.0.1', 0)) as taken:
            port = taken.getsockname()[1]
            self.reload(self.profiles(default=self.port, second=port))
            health = self.app.health()
            self.assertEqual(health['status'], 'problem')
            self.assertIn(f'Port {port} of profile second', health['problems'][0])
        self.app.reload()
        self.assertEqual(self.app.health()['problems'], [])

    def test_a_profile_whose_new_port_is_taken_keeps_its_old_one(self):
        with socket.create_server(('127.0.0.1', 0)) as taken:
            self.reload(self.profiles(default=taken.getsockname()[1]))
            self.assertEqual(self.health(self.port)['status'], 'problem')
            self.assertEqual(self.app.ports(), {'default': self.port})

    def test_a_restart_loses_nothing(self):
        """A key cools as long as before, and a conversation stays at the other one."""
        document, session = make_document('a', 'b', anthropicBaseUrl=self.anthropic.url), {
            'x_claude_code_session_id': 's'}
        self.anthropic.limited.add('a')
        self.assertEqual(self.send(**session).headers['x-proxy-attempts'], 'a=429,b=200')
        before = self.app.health()
        self.stop()
        self.assertEqual(stat.S_IMODE(os.stat(cf.state_path(self.path)).st_mode), 0o600)
        self.start(document)
        after = self.app.health()
        self.assertEqual([c['key'] for c in after['cooldowns']], ['a'])
        self.assertLessEqual(after['cooldowns'][0]['remaining_ms'],
                             before['cooldowns'][0]['remaining_ms'])
        self.assertEqual(after['metrics'], before['metrics'])
        self.anthropic.limited.clear()
        self.assertEqual(self.send().headers['x-proxy-key'], 'b')
        self.app.cooldowns.clear()
        self.assertEqual(self.send(**session).headers['x-proxy-key'], 'b')
        self.assertEqual(self.send().headers['x-proxy-key'], 'a')
        self.stop()
        self.assertEqual(self.log_lines('state_ignored'), [])         # nor of the first start

    def test_what_is_known_is_saved_while_it_runs(self):
        saved = threading.Event()
        with mock.patch.object(self.app.state, 'save', saved.set):
            self.assertTrue(saved.wait(PATIENCE_S))

    def test_a_stop_that_is_cut_short_has_saved_what_was_known_when_it_began(self):
        self.stop()
        with mock.patch.object(cf, 'SAVE_S', 3600):
            self.start(make_document('a', 'b', anthropicBaseUrl=self.anthropic.url))
        self.anthropic.limited.add('a')
        self.send()
        self.anthropic.hold, saved, save = (threading.Event(), threading.Event(),
                                            self.app.state.save)
        threading.Thread(target=self.send, daemon=True).start()
        for _ in range(3):
            self.assertTrue(self.anthropic.asked_for.acquire(timeout=PATIENCE_S))
        self.app.state.save = lambda: (save(), saved.set())
        self.app.stop()
        self.assertTrue(saved.wait(PATIENCE_S) and self.thread.is_alive())
        with open(self.app.state.path) as file:
            self.assertEqual([entry['key'] for entry in json.load(file)['cooldowns']],
                             ['anthropic:a'])
        self.anthropic.hold.set()

    def test_a_state_that_cannot_be_saved_stops_nothing(self):
        with mock.patch.object(cf.State, '_dump', side_effect=RuntimeError('x')):
            self.send()
            self.stop()
        self.assertFalse(self.thread.is_alive())
        self.assertTrue(self.log_lines('save_failed') and self.log_lines('stopped'))

    def test_profiles_may_swap_their_ports(self):
        one, two = free_port(), free_port()
        self.reload(self.profiles(default=one, second=two))
        self.reload(self.profiles(default=two, second=one))
        self.assertEqual((self.app.ports(), self.app.port_problems),
                         ({'default': two, 'second': one}, {}))
        self.assertEqual(self.health(one)['profiles'][1]['port'], one)

    def test_where_it_runs_is_noted_while_it_runs(self):
        self.assertTrue(self.app.pid_file.acquire())
        for port in (self.port, free_port()):
            self.reload(self.profiles(default=port))
            self.assertEqual(cf.find_running(self.path)[:3], (os.getpid(), [port], True))
            self.assertEqual(cf.fetch_health(self.path, None)['pid'], os.getpid())
        self.app._close_all()
        self.assertEqual(cf.find_running(self.path).ports, [])
        self.stop()
        self.assertIsNone(cf.find_running(self.path))
        self.assertIsNone(cf.fetch_health(self.path, None))

    def test_a_wrong_file_is_told_and_changes_nothing(self):
        self.reload('{"queueWaitMs": "x"}')
        health = self.send('GET', '/health').json
        self.assertEqual(health['status'], 'problem')
        self.assertIn('queueWaitMs must be', health['problems'][0])
        self.assertEqual(self.send().status, 200)
        self.stop()
        self.assertEqual(len(self.log_lines('config_refused')), 1)

    def test_a_folder_that_cannot_be_read_is_told_once(self):
        with mock.patch.object(cf.ConfigStore, '_look',
                               side_effect=cf.ConfigError('the folder cannot be read')):
            for _ in range(3):
                self.app.reload()
            self.assertEqual(self.send('GET', '/health').json['problems'],
                             ['the folder cannot be read'])
            self.assertEqual(self.send().status, 200)
        self.stop()
        self.assertEqual(len(self.log_lines('config_refused')), 1)

    def test_a_changed_token_ends_its_cooldown(self):
        self.anthropic.limited.add('a')
        self.send()
        document = make_document('a', 'b', anthropicBaseUrl=self.anthropic.url)
        document['keys']['a']['token'] = token_of('fresh')
        self.reload(document)
        self.send()
        self.assertEqual(self.anthropic.seen[-1][0], 'fresh')

    def test_a_changed_base_url_ends_cooldowns_and_a_changed_label_does_not(self):
        self.anthropic.limited.add('a')
        self.send()
        document = make_document('a', 'b', anthropicBaseUrl=self.anthropic.url)
        document['keys']['a']['label'] = 'renamed'
        self.reload(document)
        self.assertEqual(len(self.app.cooldowns.snapshot()), 1)
        document['keys']['a']['baseUrl'] = self.anthropic.url
        self.reload(document)
        self.assertEqual(self.app.cooldowns.snapshot(), [])

    def test_a_changed_base_url_of_all_keys_ends_their_cooldowns(self):
        for field in ('anthropicBaseUrl', 'openaiBaseUrl', 'codexBaseUrl'):
            self.anthropic.limited.add('a')
            self.send()
            self.assertEqual(len(self.app.cooldowns.snapshot()), 1)
            self.reload({**make_document('a', 'b', anthropicBaseUrl=self.anthropic.url),
                         field: f'{self.anthropic.url}/v1'})
            self.assertEqual(self.app.cooldowns.snapshot(), [], field)

    def test_a_stop_lets_a_running_answer_finish_and_takes_no_new_one(self):
        self.anthropic.hold = threading.Event()
        answers = queue.Queue()
        threading.Thread(target=lambda: answers.put(self.send()), daemon=True).start()
        self.assertTrue(self.anthropic.asked_for.acquire(timeout=PATIENCE_S))
        closed = threading.Event()
        self.app.cooldowns.wake_all = closed.set      # what follows the closing of the ports
        self.app.stop()
        self.assertTrue(closed.wait(PATIENCE_S))
        self.anthropic.hold.set()
        self.assertEqual(answers.get(timeout=PATIENCE_S).status, 200)
        self.thread.join(PATIENCE_S)
        with self.assertRaises(ConnectionRefusedError):
            self.send()


# ==============================================================================
# Doctor
# ==============================================================================

class DoctorTest(ProgramTest):
    def setUp(self):
        super().setUp()
        self.assertTrue(self.app.pid_file.acquire())
        self.app._note_ports()
        os.environ['SHELL'] = '/bin/zsh'
        patch = mock.patch('shutil.which', return_value=None)
        patch.start()
        self.addCleanup(patch.stop)

    def findings(self, path=None):
        return list(cf.diagnose(path or self.path))

    def wrong(self, *topics):
        """[(topic, text), ...] of what is wrong, of some topics."""
        return [(f.topic, f.text) for f in self.findings() if f.remedy
                and (not topics or f.topic in topics)]

    def test_the_access_token_goes_to_the_running_proxy_alone(self):
        seen = []

        def pretend(sock, number):
            seen.append(read_request(sock)[0].decode())
            sock.sendall(plain_answer(json.dumps({'program': cf.PROGRAM, 'pid': 4711}).encode()))
        server, other = RawServer(self, pretend), RawServer(self, pretend)
        path = os.path.join(self.folder, 'another', 'config.json')
        config = cf.parse_config({'accessToken': 'open-sesame',
                                  'profiles': {'default': {'port': server.port}}})

        def sends_token(port):
            """Whether it shows the token to one of whom the pid file tells with this port."""
            with open(pid_file.path, 'w') as file:
                json.dump({'pid': os.getpid(), 'ports': [port], 'namespace': cf.pid_namespace()},
                          file)
            self.assertEqual(cf.fetch_health(path, config), {'program': cf.PROGRAM, 'pid': 4711})
            return 'open-sesame' in seen[-1]
        self.assertEqual(cf.fetch_health(path, config)['pid'], 4711)        # there is no pid file
        self.assertNotIn('sesame', seen[-1])
        pid_file = cf.PidFile(path)
        os.makedirs(os.path.dirname(path))
        self.assertFalse(sends_token(server.port))    # it was killed: nobody holds its file
        self.assertTrue(pid_file.acquire())
        self.addCleanup(pid_file.release)
        cf.fetch_health(path, config)
        self.assertNotIn('sesame', seen[-1])          # it has not opened its ports yet
        self.assertTrue(sends_token(server.port))
        self.assertTrue(sends_token(other.port))      # its ports are others than those of the file
        other.listener.shutdown(socket.SHUT_RDWR)
        self.assertFalse(sends_token(other.port))     # the file's port is none of its

    def test_all_is_well_where_everything_is(self):
        cf.ToolSetup(self.path).configure(cf.TOOLS[1], f'http://localhost:{self.port}')
        findings = self.findings()
        self.assertEqual([f for f in findings if f.remedy], [])
        told = '\n'.join(f'{f.topic} {f.text}' for f in findings)
        for words in (f'claude-failover {cf.VERSION}', 'config.json: 2 keys, 1 profile',
                      f'pid {os.getpid()}', f'default: http://localhost:{self.port}',
                      'anthropic:a (sk-ant-api...cdef): ready, 0 answers',
                      f'zsh: uses http://localhost:{self.port}',
                      f'{self.anthropic.url}: reached, 200', f'anthropic:b at '
                      f'{self.anthropic.url}/v1/models?limit=1: 200, the key is accepted'):
            self.assertIn(words, told)
        self.assertNotIn('0123456789', told)
        self.assertEqual({(method, path) for _, method, path, _ in self.anthropic.seen},
                         {('HEAD', '/'), ('GET', '/v1/models?limit=1')})

    def test_what_is_wrong_is_found_with_its_remedy(self):
        cf.ToolSetup(self.path).configure(cf.TOOLS[1], 'http://localhost:1')
        document = make_document('a', anthropicBaseUrl=self.anthropic.url, queueWaitMS=1,
                                 **with_openai('o', openaiBaseUrl='http://localhost:9'))
        document['keys']['e'] = {'token': 'env:NOT_SET'}
        self.reload(document)
        os.environ['SSL_CERT_FILE'] = '/nowhere'
        self.anthropic.refused.add('a')
        self.send()
        wrong = dict(self.wrong())
        self.assertIn('queueWaitMS is not known', wrong['configuration'])
        self.assertIn('zsh: uses http://localhost:1', wrong['tool'])
        self.assertIn('SSL_CERT_FILE=/nowhere', wrong['environment'])
        self.assertEqual(wrong['server'], 'http://localhost:9: localhost: Connection refused')
        self.assertEqual(self.wrong('key'), [
            ('key', 'anthropic:e (env:NOT_SET): environment variable NOT_SET is not set'),
            ('key', f'anthropic:a at {self.anthropic.url}/v1/models?limit=1: 401, bad key')])
        self.stop()
        self.assertIn('cooldown key=a reason=auth_failed',
                      ' '.join(f.text for f in self.findings() if f.topic == 'log'))
        self.assertIn(('proxy', 'not running'), self.wrong())

    def test_a_file_that_others_can_read_wants_a_remedy_only_where_it_stays_so(self):
        for failure, is_wrong in ((None, False),
                                  (PermissionError(1, 'Operation not permitted'), True)):
            os.chmod(self.path, 0o644)
            with mock.patch('os.chmod', side_effect=failure,
                            wraps=os.chmod) if failure else contextlib.nullcontext():
                found = [finding for finding in self.findings() if 'by others' in finding.text]
            self.assertEqual([bool(finding.remedy) for finding in found], [is_wrong])

    def test_a_clock_that_is_off_is_found(self):
        for date, off_s in (('Tue, 14 Nov 2023 22:13:20 GMT', 0),
                            ('Tue, 14 Nov 2023 22:03:20 GMT', 600), (None, 0), ('soon', 0)):
            self.assertEqual(cf.clock_offset_s(date, START), off_s)
        for off_s, words in ((3600, '60 min ahead'), (-3600, '60 min behind')):
            self.anthropic.fields = [('date', cf.http_date(round(time.time()) - off_s))]
            self.assertIn(f"this machine's clock is {words}", dict(self.wrong('clock'))['clock'])

    def test_a_server_that_does_not_answer_in_time_is_said_to(self):
        with mock.patch.object(cf.Upstream, 'open', side_effect=cf.UpstreamTimeout):
            self.assertEqual(self.wrong('server'),
                             [('server', f'{self.anthropic.url}: no answer in time')])

    def test_a_key_that_cools_for_one_model_is_limited_in_json_alone(self):
        self.anthropic.limited.add('a')
        self.send()
        for command in ('status', 'list-keys', 'doctor'):
            shown = run_command('--config', self.path, command).stdout
            self.assertIn('cooling for some models', shown)
            self.assertNotRegex(shown, r'\blimited\b')
        self.assertIn('"state": "limited"',
                      run_command('--config', self.path, 'list-keys', '--json').stdout)

    def test_a_broken_configuration_and_a_taken_port_are_found(self):
        self.stop()
        self.write_config('{ broken')
        self.assertIn('is not valid JSON', dict(self.wrong('configuration'))['configuration'])
        taken = RawServer(self, lambda sock, number: None)
        document = make_document('a', anthropicBaseUrl=self.anthropic.url)
        document['profiles']['default']['port'] = taken.port
        self.write_config(document)
        self.assertEqual(self.wrong('port'), [
            ('port', f'{taken.port} of profile default is taken by another program')])

    @needs('/proc')
    @mock.patch('claude_failover.run_commands', lambda commands: None)
    def test_an_autostart_of_another_program_is_found(self):
        autostart = cf.find_autostart(self.path)
        cf.start_at_login(autostart)
        self.assertEqual(self.wrong('autostart'), [])
        cf.start_at_login(autostart._replace(
            content=autostart.content.replace(b'claude_failover.py', b'moved.py')))
        self.assertIn('another program', self.wrong('autostart')[0][1])
        plist = cf.find_autostart('/c', {}, 'darwin', '/home/me')
        self.assertEqual(cf.start_commands(plist, plist.content)[1:],
                         [*cf.BOOT, SCRIPT, '--config', '/c', 'start'])

    def test_each_servers_answer_to_a_key_is_judged(self):
        def tested(key, config=self.app.store.current):
            near, far = socket.socketpair()
            with near, far:
                return cf.test_key(config, key, upstream, cf.Exchange(near))
        upstream = cf.Upstream()
        self.addCleanup(upstream.close_idle)
        anthropic = self.app.store.current.keys['anthropic:a']
        for status, is_valid in (('200 OK', True), ('401 Unauthorized', False),
                                 ('403 Forbidden', False), ('404 Not Found', True),
                                 ('429 Too Many Requests', True),
                                 ('500 Internal Server Error', False)):
            body = json.dumps(api_error('x', f'about {token_of("a")}')).encode()
            server = RawServer(self, lambda sock, number, s=status, b=body: (
                read_request(sock), sock.sendall(plain_answer(b, s))))
            outcome = tested(anthropic._replace(base_url=server.url))
            self.assertEqual((outcome.is_valid, outcome.status), (is_valid, int(status[:3])))
            self.assertNotIn('0123456789', outcome.message)
        asked = []

        def note(sock, number):
            asked.append(read_request(sock)[0].decode())
            sock.sendall(plain_answer(b'{}'))
        url = RawServer(self, note).url
        for provider, token, base_url, path, field in (
                ('anthropic', 'sk-ant-oat01-x', f'{url}/prefix/v1', '/prefix/v1/models?limit=1',
                 'authorization: Bearer sk-ant-oat01-x'),
                ('anthropic', 'sk-ant-api03-x', url, '/v1/models?limit=1',
                 'x-api-key: sk-ant-api03-x'),
                ('openai', 'none', f'{url}/v1', '/v1/models', 'authorization: Bearer none'),
                ('openai', 'none', url, '/v1/models', 'Bearer'),
                ('openai', 'none', f'{url}/v1/chat/completions', '/v1/models', 'Bearer')):
            outcome = tested(anthropic._replace(provider=provider, token=token, base_url=base_url))
            self.assertTrue(asked[-1].startswith(f'GET {path} HTTP/1.1\r\n'), asked[-1])
            self.assertIn(field, asked[-1])
            self.assertEqual(outcome.url, url + path)
        config = self.app.store.current._replace(codex_base_url=f'{url}/codex')
        tested(anthropic._replace(provider='openai', token=make_login(exp=4_000_000_000)), config)
        self.assertTrue(asked[-1].startswith(f'GET /codex/models?client_version={cf.VERSION} '))
        self.assertIn('chatgpt-account-id: acc-1', asked[-1])
        self.assertEqual(tested(anthropic._replace(token='env:NOPE'))[:3],
                         (False, 0, 'environment variable NOPE is not set'))
        self.assertEqual(tested(anthropic._replace(base_url='http://localhost:9'))[:2], (False, 0))


# ==============================================================================
# Demo
# ==============================================================================

class DemoTest(ScratchTest):
    def test_it_shows_everything_and_leaves_nothing_behind(self):
        temporary = os.path.join(self.folder, 'tmp')
        os.mkdir(temporary)
        done = run_process('demo', '--fast', TMPDIR=temporary, ANTHROPIC_API_KEY=token_of('real'),
                           HTTPS_PROXY='http://127.0.0.1:9', https_proxy='http://127.0.0.1:9')
        self.assertEqual((done.returncode, done.stderr), (0, ''))
        for words in ('claude-opus-5-5: personal 200', 'personal 429 -> work 200',
                      'personal 529 -> work 200',
                      'work 529 -> work 529 -> claude-sonnet-5-5 on personal 200',
                      'personal 429 -> work 429 -> personal 200, held 2.0 s',
                      'personal 429 -> work 429 -> gpt-5.4-mini on openai 200',
                      'in the words of Claude', '7 of 7 requests were answered; without the',
                      '6 rotations, 2 fallbacks, 1 queued, 1 answered by OpenAI.',
                      f'python3 {SCRIPT} add-key', f'python3 {SCRIPT} start'):
            self.assertIn(words, re.sub(r'\s+', ' ', done.stdout))
        self.assertNotIn('\x1b', done.stdout)
        self.assertEqual([files for _, folders, files in os.walk(self.folder) if files], [])
        self.assertEqual(os.listdir(temporary), [])

    def test_a_narrow_window_is_no_mess(self):
        done = run_command('demo', '--fast', COLUMNS='60')
        self.assertEqual([line for line in done.stdout.splitlines() if len(line) > 60
                          and SCRIPT not in line], [])

    def test_a_port_that_is_taken_is_one_clear_sentence(self):
        taken = RawServer(self, lambda sock, number: None)
        done = run_command('demo', '--fast', '--port', str(taken.port))
        self.assertEqual((done.returncode, done.stdout), (1, ''))
        self.assertEqual(done.stderr, f'claude-failover: Port {taken.port} of profile default '
                         'cannot be opened (Address already in use). '
                         'Choose another with --port, or leave it out.\n')

    def test_it_is_ended_by_ctrl_c_and_by_kill(self):
        # A shell makes what runs in the background ignore Ctrl-C, and its children inherit that.
        self.addCleanup(signal.signal, signal.SIGINT,
                        signal.signal(signal.SIGINT, signal.default_int_handler))
        for number in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(number.name):
                self.assertEqual(self.end_demo(number), (130, '', []))

    def end_demo(self, number):
        """(exit status, stderr, what it left behind) of a demo that gets a signal."""
        port = free_port()
        command = [sys.executable, SCRIPT, 'demo', '--fast', '--keep', '--port', str(port)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              env={**os.environ, 'TMPDIR': self.folder}) as process:
            for line in process.stdout:
                if f'localhost:{port}' in line:
                    break
            self.assertEqual(os.listdir(self.folder)[0][:20], 'claude-failover-demo')
            process.send_signal(number)
            return process.wait(PATIENCE_S), process.stderr.read(), os.listdir(self.folder)

    def demo(self):
        folder = tempfile.mkdtemp(dir=self.folder)
        cf.forget_user(folder)
        demo = cf.Demo(folder, 0, 0)
        self.addCleanup(demo.close)
        return demo

    def test_it_calls_nobody_whatever_its_dashboard_is_told(self):
        demo = self.demo()
        demo.app.update(lambda config: cf.change_settings(config, {
            'anthropicBaseUrl': 'https://api.anthropic.com'}))
        with mock.patch('socket.getaddrinfo', side_effect=AssertionError('a name was looked up')):
            outcome = cf.test_key(demo.app.store.current,
                                  demo.app.store.current.keys['anthropic:work'], demo.app.upstream,
                                  mock.MagicMock())
        self.assertEqual((outcome.status, outcome.message),
                         (0, 'api.anthropic.com: the demo calls nobody'))
        self.assertEqual(set(os.environ) - {'LANG', 'TERM', 'TZ', 'COLUMNS', 'NO_COLOR', 'LC_ALL'},
                         {'HOME', 'PATH'})

    def test_everyday_traffic_is_answered_and_shows_limits(self):
        demo = self.demo()
        demo.app.update(lambda config: cf.change_settings(config, {'queueWaitMs': 0}))
        for scene in cf.EVERYDAY:
            for record, _, text in demo.play(scene):
                self.assertEqual((record['outcome'], text[:8]), ('answered', 'This is '))
        health = demo.app.health()
        self.assertEqual([window['name'] for window in health['keys'][0]['windows']],
                         ['5h', '7d', 'requests', 'tokens'])
        self.assertTrue(health['cooldowns'])

    @needs(SDK_PYTHON)
    def test_the_official_sdks_can_be_pointed_at_it(self):
        demo = self.demo()
        program = '''
import sys, json, anthropic, openai
messages = [{'role': 'user', 'content': 'hi'}]
question = dict(model='claude-sonnet-5-5', max_tokens=50, messages=messages)
claude = anthropic.Anthropic(base_url=sys.argv[1], api_key='any', max_retries=0)
with claude.messages.stream(**question) as stream:
    streamed = stream.get_final_message()
gpt = openai.OpenAI(base_url=sys.argv[2], api_key='any', max_retries=0)
chat = dict(model='gpt-5.4', messages=messages)
chunks = list(gpt.chat.completions.create(stream=True, **chat))
print(json.dumps([
    claude.messages.create(**question).content[0].text,
    streamed.content[0].text, streamed.usage.output_tokens > 5,
    claude.messages.count_tokens(model=question['model'], messages=messages).input_tokens > 0,
    [model.id for model in claude.models.list()][0],
    gpt.chat.completions.create(**chat).choices[0].message.content,
    ''.join(chunk.choices[0].delta.content or '' for chunk in chunks if chunk.choices),
    chunks[-1].usage.completion_tokens > 5,
    [model.id for model in gpt.models.list()]]))
'''
        done = subprocess.run([SDK_PYTHON, '-c', program, f'http://127.0.0.1:{demo.port}',
                               f'{demo.upstream.url}/openai/v1'], capture_output=True, text=True,
                              timeout=60, env={'PATH': '/usr/bin:/bin', 'HOME': self.folder,
                                               'NO_PROXY': '127.0.0.1'})
        self.assertEqual(done.returncode, 0, done.stderr)
        claude = 'This is claude-sonnet-5-5, by way of the key personal. What is next?'
        gpt = 'This is gpt-5.4, in the words of Claude. What is next?'
        self.assertEqual(json.loads(done.stdout),
                         [claude, claude, True, True, OPUS, gpt, gpt, True, ['gpt-5.4']])


# ==============================================================================
# Command line
# ==============================================================================

class CommandLineTest(ScratchTest):
    """The program as a user runs it in a scratch HOME; what starts a proxy, as a process."""

    run_command = staticmethod(run_command)

    def setUp(self):
        super().setUp()
        self.path = os.path.join(self.folder, '.config', 'claude-failover', 'config.json')

    def start(self, *arguments, executable=(sys.executable,), **environ):
        """Starts the proxy; (process, port, what it printed)."""
        process = subprocess.Popen([*executable, SCRIPT, *arguments, 'start'],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   encoding='utf-8', env={**os.environ, **environ})
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait, PATIENCE_S)
        self.addCleanup(process.kill)
        printed = ''
        for line in process.stdout:
            printed += line
            if line.startswith('Log'):
                break
        port = re.search(r'default +http://localhost:(\d+)', printed)
        return process, int(port.group(1)) if port else None, printed

    def free_port_document(self, *keys, **changes):
        """A document with a fixed free port, so that other commands find the proxy."""
        document = make_document(*keys, **changes)
        document['profiles']['default']['port'] = free_port()
        return document

    def test_keys_are_added_listed_and_removed_without_showing_a_token(self):
        token = token_of('a')
        added = self.run_command('add-key', token, 'My', 'Key')
        self.assertEqual((added.returncode, added.stdout.split('\n')[0]),
                         (0, 'Added key my-key (sk-ant-api...cdef), first in profile default.'))
        self.assertEqual(added.stderr.count('shell\'s history'), 1)
        self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o600)
        added = self.run_command('add-key', '-', '--label', 'two',
                                 stdin='sk-ant-oat01-' + 'x' * 40 + '\n')
        self.assertEqual((added.returncode, added.stderr), (0, ''))
        added = self.run_command('add-key', 'env:MY_KEY_OF_THIS_SHELL', 'three')
        self.assertEqual((added.returncode, added.stderr.count('history')),
                         (0, 0))    # a name is no secret
        listed = self.run_command('list-keys')
        self.assertIn('my-key -> ', listed.stdout.replace('anthropic:', ''))
        self.assertIn('env:MY_KEY_OF_THIS_SHELL', listed.stdout)
        for output in (added.stdout, listed.stdout,
                       self.run_command('list-keys', '--json').stdout):
            self.assertNotIn('0123456789', output)
        self.assertEqual(self.run_command('remove-key', 'my-key').stdout, 'Removed key my-key.\n')
        self.assertEqual([k['id'] for k in json.loads(
            self.run_command('list-keys', '--json').stdout)['keys']], ['two', 'three'])

    def test_openai_keys_are_added_and_switch_their_fallback_on(self):
        added = self.run_command('add-openai-key', '-', 'my openai',
                                 stdin=openai_token_of('x') + '\n')
        self.assertEqual((added.returncode, added.stdout.splitlines()[:2], added.stderr), (0, [
            'Added key my-openai (sk-proj...cdef), first in profile default.',
            'openaiModelFallback is on now: OpenAI answers where Claude cannot.'], ''))
        added = self.run_command('add-openai-key', 'none', '--label', 'local', '--base-url',
                                 'http://localhost:11434/v1')
        self.assertEqual((added.returncode, added.stderr), (0, ''))
        self.assertIn('"modelMapping": {"*": "..."} at openaiKeys.local', added.stdout)
        entry = self.read_config()['openaiKeys']['local']
        self.assertEqual((entry['token'], entry['baseUrl']), ('none', 'http://localhost:11434/v1'))
        self.assertIn('openai:my-openai -> openai:local', self.run_command('list-keys').stdout)

    def test_a_login_that_is_over_is_told_wherever_keys_are(self):
        login = make_login(exp=int(START))
        added = self.run_command('add-openai-key', '-', 'chatgpt', stdin=login)
        self.assertIn('the ChatGPT login expired', added.stderr)
        self.write_config({**self.read_config(),
                           'profiles': self.free_port_document()['profiles']})
        process, _, printed = self.start()
        for output in (self.run_command('list-keys').stderr, self.run_command('status').stdout,
                       self.run_command('list-keys', '--json').stdout,
                       self.run_command('health').stdout):
            self.assertIn('codex login', output)
            self.assertNotIn(login[:30], output)
        self.assertIn('1 OpenAI', printed)
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)
        self.assertIn('key openai:chatgpt cannot be used: the ChatGPT login expired',
                      process.stderr.read())

    def test_wrong_input_is_one_line_on_stderr_and_status_2(self):
        self.write_config(make_document('a'))
        for arguments, words in (
                (('add-openai-key', token_of('b')), 'add it with add-key'),
                (('add-openai-key', '-'), 'empty'),
                (('add-openai-key', 'sk-x', '--base-url', 'localhost'), 'baseUrl must be a URL'),
                (('add-key', 'sk-proj-x'), 'begins with "sk-ant-"'),
                (('add-key', token_of('a')), 'already'), (('add-key',), 'no terminal'),
                (('add-key', '-'), 'empty'), (('remove-key', 'nope'), "no key 'nope'")):
            with self.subTest(arguments=arguments):
                done = self.run_command(*arguments)
                self.assertEqual((done.returncode, done.stdout), (2, ''))
                self.assertIn(words, done.stderr)
                self.assertNotIn('Traceback', done.stderr)
                self.assertNotIn('0123456789', done.stderr)
        for arguments in ((), ('nonsense',), ('logs', '-n', 'x')):
            self.assertEqual(self.run_command(*arguments).returncode, 2)

    def test_a_wrong_configuration_stops_every_command_with_status_2(self):
        self.write_config('{"profiles": {"default": {"port": "4080"}}}')
        for command in (('start',), ('status',), ('health',), ('list-keys',),
                        ('add-key', token_of('b'))):
            done = self.run_command(*command)
            self.assertEqual(done.returncode, 2, command)
            self.assertIn('profiles.default.port must be a number', done.stderr)
            self.assertIn(self.path, done.stderr)

    def test_another_file_is_chosen_by_option_or_environment(self):
        other = os.path.join(self.folder, 'other dir', 'my.json')
        for arguments, environ in ((('--config', other, 'add-key', token_of('a')), {}),
                                   (('add-key', token_of('b'), '--config', other), {}),
                                   (('add-key', token_of('c')),
                                    {'CLAUDE_FAILOVER_CONFIG': other})):
            self.assertEqual(self.run_command(*arguments, **environ).returncode, 0)
        with open(other) as file:
            self.assertEqual(len(json.load(file)['keys']), 3)
        self.assertFalse(os.path.exists(self.path))

    def test_version_and_help(self):
        self.assertEqual(self.run_command('--version').stdout, f'claude-failover {cf.VERSION}\n')
        self.assertIn('claude-failover start', self.run_command('start', '--help').stdout)
        for command in cf.COMMANDS:
            with contextlib.redirect_stdout(io.StringIO()) as printed, \
                    self.assertRaises(SystemExit):
                cf.argument_parser().parse_args([command.name, '--help'])
            self.assertIn(f'claude-failover {command.name}', printed.getvalue())

    def test_commands_that_read_the_running_proxy_say_when_there_is_none(self):
        self.write_config(self.free_port_document('a'))
        for command in ('status', 'health'):
            done = self.run_command(command)
            self.assertEqual((done.returncode, done.stdout), (1, ''))
            self.assertIn(f'not running. Start it with: python3 {SCRIPT} start', done.stderr)

    def test_start_tells_ports_and_keys_and_serves_until_it_is_stopped(self):
        self.write_config(self.free_port_document('a', 'b',
                                                  openaiKeys={'o': {'token': 'sk-proj-x'}}))
        process, port, printed = self.start()
        self.assertIn('2 Anthropic, 1 OpenAI', printed)
        self.assertIn(f'http://localhost:{port}/dashboard', printed)
        health = json.loads(self.run_command('health').stdout)
        self.assertEqual((health['pid'], health['status']), (process.pid, 'ok'))
        status = self.run_command('status').stdout
        for words in (f'running, pid {process.pid}', f'http://localhost:{port}',
                      'sk-ant-api...cdef', 'ready', '0 rotations'):
            self.assertIn(words, status)
        self.assertNotIn('\x1b', status)
        self.assertEqual(json.loads(self.run_command('status', '--json').stdout)['pid'],
                         process.pid)
        second = self.run_command('start')
        self.assertEqual(second.returncode, 1)
        self.assertIn(f'is running already (pid {process.pid})', second.stderr)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(PATIENCE_S), 0)
        self.assertEqual(process.stderr.read(), '')
        events = [json.loads(line)['event']
                  for line in self.run_command('logs', '--json').stdout.splitlines()]
        self.assertEqual(events, ['started', 'stopped'])

    def test_a_port_that_another_program_has_is_named_with_the_remedy(self):
        taken = RawServer(self, lambda sock, number: None)
        document = make_document('a')
        document['profiles']['default']['port'] = taken.port
        self.write_config(document)
        done = self.run_command('start')
        self.assertEqual((done.returncode, done.stdout), (1, ''))
        self.assertIn(f'Port {taken.port} of profile default cannot be opened', done.stderr)
        self.assertIn('"port" in', done.stderr)

    def daemon(self, *command):
        """Starts it in the background; its pid, or None where it failed, and what was said."""
        done = self.run_command(*(command or ('start', '-d')))
        pid = re.search(r'in the background, pid (\d+)', done.stdout)
        if pid:
            self.addCleanup(self.run_command, 'stop', '--now')
        return int(pid.group(1)) if pid else None, done

    def test_a_second_instance_touches_nothing_though_its_port_is_free(self):
        self.write_config(make_document('a'))     # on a port that the system chooses
        process, port, _ = self.start()
        self.ask(port, 'GET', '/api/logs')        # whatever waited to be written is in the log now

        def files():
            found = {}
            for folder, _, names in os.walk(os.path.dirname(self.path)):
                for name in names:
                    with open(os.path.join(folder, name), 'rb') as file:
                        found[name] = file.read()
            return found
        before = files()
        for command in (('start',), ('start', '-d')):
            second = self.run_command(*command)
            self.assertEqual((second.returncode, second.stdout), (1, ''))
            self.assertRegex(second.stderr, rf'\Aclaude-failover: claude-failover is running '
                             rf'already \(pid {process.pid}\)\.[^\n]*\n\Z')
            self.assertEqual(files(), before)
        self.assertIsNone(process.poll())

    def test_a_file_that_gets_the_access_token_is_made_private_and_that_is_said(self):
        self.write_config(self.free_port_document('a', accessToken='open-sesame'))
        settings = os.path.join(self.folder, '.claude', 'settings.json')
        os.makedirs(os.path.dirname(settings))
        with open(settings, 'w') as file:
            file.write('{}')
        os.chmod(settings, 0o644)
        done = self.run_command('setup', '--only', 'claude-code')
        with open(settings) as file:
            self.assertIn('open-sesame', file.read())
        self.assertEqual(stat.S_IMODE(os.stat(settings).st_mode), 0o600)
        self.assertEqual(done.stdout.count('mode 644'), 1, done.stdout)

    def test_an_access_token_on_the_command_line_is_warned_about_once(self):
        for arguments, stdin, count in (
                (('accessToken', 'a-long-secret-of-many-characters'), '', 1),
                (('accessToken', '-'), 'a-long-secret-of-many-characters', 0),
                (('accessToken', 'null'), '', 0), (('queueWaitMs', '5'), '', 0)):
            done = self.run_command('config', 'set', *arguments, stdin=stdin)
            self.assertEqual((done.returncode, done.stderr.count('shell\'s history')), (0, count),
                             (arguments, done.stderr))
            self.assertNotIn('a-long-secret', done.stdout + done.stderr)

    def test_a_file_that_others_could_read_is_made_private_and_each_command_says_so_once(self):
        for command in (('add-key', 'env:X', 'x'), ('config', 'set', 'queueWaitMs', '5'),
                        ('config', 'get', 'queueWaitMs'), ('list-keys',), ('remove-key', 'x'),
                        ('setup', '--dry-run', '--only', 'zsh'), ('doctor',)):
            document = self.free_port_document('a')
            document['keys'].update({} if command[0] == 'add-key' else {'x': {'token': 'env:X'}})
            self.write_config(document)
            os.chmod(self.path, 0o644)
            done = self.run_command(*command)
            self.assertEqual((done.stdout + done.stderr).count('mode 644'), 1,
                             (command, done.stderr))
            self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o600)

    def test_a_file_that_is_gone_is_not_begun_anew_beside_a_proxy_that_has_it_in_force(self):
        self.write_config(make_document('a'))
        process, _, _ = self.start()
        os.unlink(self.path)
        refused = self.run_command('config', 'set', 'queueWaitMs', '5')
        self.assertEqual((refused.returncode, os.path.exists(self.path)), (2, False))
        self.assertRegex(refused.stderr, rf'config.json is gone.*pid {process.pid}.*dashboard')
        process.kill()
        process.wait(PATIENCE_S)
        self.assertEqual(self.run_command('config', 'set', 'queueWaitMs', '5').returncode, 0)
        self.assertEqual(self.read_config(), {'queueWaitMs': 5})

    def test_a_daemon_is_started_serves_and_is_stopped(self):
        self.write_config(self.free_port_document('a', accessToken='open-sesame'))
        pid, done = self.daemon()
        self.assertEqual((done.returncode, done.stderr), (0, ''))
        self.assertIn('http://localhost:', done.stdout)
        self.assertEqual(json.loads(self.run_command('health').stdout)['pid'], pid)
        for command in (('start',), ('start', '-d')):
            second = self.run_command(*command)
            self.assertEqual((second.returncode, second.stdout), (1, ''))
            self.assertIn(f'is running already (pid {pid})', second.stderr)
        again, done = self.daemon('restart')
        self.assertNotIn(again, (pid, None), done.stderr)
        stopped = self.run_command('stop')
        self.assertEqual((stopped.returncode, stopped.stdout), (0, f'Stopped (pid {again}).\n'))
        stopped = self.run_command('stop')
        self.assertEqual((stopped.returncode, stopped.stdout), (0, 'not running\n'))
        self.assertEqual(self.run_command('health').returncode, 1)

    def test_a_start_removes_what_killed_programs_left_but_not_where_one_runs(self):
        self.write_config(self.free_port_document('a'))
        folder = os.path.dirname(self.path)

        def leave():
            for name in ('config.json', 'running.json', 'setup.json', 'state.json'):
                with open(os.path.join(folder, f'{name}.4711.139776.tmp'), 'w'):
                    pass

        def left():
            return [name for name in os.listdir(folder) if name.endswith('.tmp')]
        leave()
        note = os.path.join(folder, 'running.json')       # 1.0.0's
        with open(note, 'w'):
            pass
        self.start()
        self.assertEqual((left(), os.path.exists(note)), ([], False))
        leave()
        self.assertIn('is running already', self.run_command('start').stderr)
        self.assertEqual(len(left()), 4)

    def test_a_daemon_that_cannot_start_says_why(self):
        taken = RawServer(self, lambda sock, number: None)
        document = make_document('a')
        document['profiles']['default']['port'] = taken.port
        for config, words in ((document, f'Port {taken.port} of profile default cannot be opened'),
                              ({'profiles': {'default': {'port': '1'}}},
                               'profiles.default.port must be a number'),
                              ('{ broken', 'is not valid JSON')):
            self.write_config(config)
            pid, done = self.daemon()
            self.assertEqual((pid, done.returncode, done.stdout), (None, 1, ''))
            self.assertIn(words, done.stderr)

    def test_a_daemon_that_was_killed_leaves_nothing_in_the_way(self):
        self.write_config(self.free_port_document('a'))
        pid, _ = self.daemon()
        os.kill(pid, signal.SIGKILL)
        self.assertEqual(self.run_command('stop').stdout, 'not running\n')
        again, done = self.daemon()
        self.assertNotIn(again, (pid, None), done.stderr)

    def test_a_pid_file_that_nobody_holds_names_nobody(self):
        self.write_config(self.free_port_document('a'))
        pid_file = cf.PidFile(self.path)
        with open(pid_file.path, 'w') as file:
            file.write(f'{os.getpid()}\n')
        self.assertEqual(self.run_command('stop').stdout, 'not running\n')
        self.assertTrue(pid_file.acquire())
        self.assertEqual((cf.PidFile(self.path).acquire(patience_s=0),
                          cf.PidFile(self.path).holder().pid), (False, os.getpid()))
        pid_file.release()
        self.assertIsNone(cf.PidFile(self.path).holder())

    def test_a_locked_pid_file_without_the_number_of_a_process_names_nobody(self):
        self.write_config(make_document('a'))
        path = cf.PidFile(self.path).path
        for text in (b'-1', b'0', b'99999999999', b'1e3', '\u0663\u0663'.encode(), b'x', b'',
                     b'{}', b'[' * 4000,
                     *(b'{"pid": %b}' % pid for pid in (b'0', b'-1', b'true', b'1e3', b'"12"'))):
            with self.subTest(text=text), open(path, 'wb', buffering=0) as file:
                file.write(text)
                self.assertTrue(cf.lock_file(file, is_shared=False))
                with self.assertRaisesRegex(cf.FailoverError, 'claude-failover.pid is locked'):
                    cf.PidFile(self.path).holder(patience_s=0)

    def test_those_who_look_at_a_pid_file_do_not_take_one_another_for_the_proxy(self):
        self.write_config(make_document('a'))
        path = cf.PidFile(self.path).path
        with open(path, 'wb') as stale:
            stale.write(b'%d\n' % os.getpid())
        with open(path, 'rb') as looker:
            self.assertTrue(cf.lock_file(looker, is_shared=True))
            self.assertIsNone(cf.PidFile(self.path).holder())

    def holder_of_the_last_of(self, *texts):
        """The pid that counts where the holder writes one text after another."""
        texts = iter(texts)
        with open(cf.PidFile(self.path).path, 'wb', buffering=0) as file:
            def write(seconds):
                text = next(texts, None)
                if text is not None:
                    file.seek(0)
                    file.truncate()
                    file.write(text)
            write(0)
            self.assertTrue(cf.lock_file(file, is_shared=False))
            with mock.patch('time.sleep', side_effect=write):
                return cf.PidFile(self.path).holder()

    def test_a_pid_counts_when_it_was_read_twice(self):
        self.write_config(make_document('a'))
        for texts in ((b'', b'4711\n'), (b'4700\n', b'4711\n'), (b'4700\n', b'', b'4711\n'),
                      (b'{"pid": 4700}', b'{"pid": 47', b'{"pid": 4711}'),
                      (b'{"pid": 4711, "ports": [1]}', b'{"pid": 4711, "ports": []}')):
            # What killed processes left is replaced by who has just taken the place.
            with self.subTest(texts=texts):
                self.assertEqual(self.holder_of_the_last_of(*texts).pid, 4711)

    def in_container(self, *command):
        """A command as the first process of a container of its own, in which all ends with it."""
        own = ['unshare', '--fork', '--kill-child', '--pid', '--mount-proc'] + [
            '--map-root-user'] * (os.geteuid() != 0)
        if not shutil.which('unshare') or subprocess.run([*own, 'true'],
                                                         stderr=subprocess.DEVNULL).returncode:
            self.skipTest('containers cannot be made here')
        return [*own, *command]

    def test_the_first_process_of_a_container_is_found_told_and_stopped(self):
        self.write_config(self.free_port_document('a', accessToken='open-sesame',
                                                  anthropicBaseUrl='http://localhost:9'))
        told = os.path.join(self.folder, 'told')
        commands = ''.join(f'"$0" {SCRIPT} {command} >> {told} 2>&1; '
                           for command in ('status', 'doctor', 'restart', 'start', 'stop'))
        script = f'exec 3<&0; (read line <&3; {commands}) & exec "$0" {SCRIPT} start'
        process = subprocess.Popen(self.in_container('sh', '-c', script, sys.executable),
                                   env=dict(os.environ), text=True, stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for close in (process.stdin.close, process.stdout.close, lambda: process.wait(PATIENCE_S),
                      process.kill):
            self.addCleanup(close)
        self.assertTrue(any(line.startswith('Log') for line in process.stdout))
        for command in (['stop'], ['restart'], ['status'],
                        ['doctor']):    # from outside: that number is another process here
            self.assertIn('runs in another container (pid 1 there)',
                          str(self.run_command(*command)))
        first = subprocess.run(self.in_container(sys.executable, SCRIPT, 'stop'),
                               capture_output=True, text=True, timeout=60, env=dict(os.environ))
        self.assertEqual((first.returncode, 'another container' in first.stderr), (1, True), first)
        self.assertIsNone(process.poll())
        process.stdin.write('\n')
        process.stdin.flush()
        self.assertEqual(process.wait(PATIENCE_S), 0)
        with open(told) as file:
            said = file.read()
        for words in ('running, pid 1,', 'runs, pid 1, for', 'restart the container',
                      'is running already (pid 1)'):
            self.assertIn(words, said)
        self.assertEqual(self.run_command('stop').stdout, 'not running\n')

    def test_a_signal_and_the_access_token_go_to_no_process_of_another_container(self):
        self.write_config(self.free_port_document('a', accessToken='open-sesame'))
        options, config = mock.Mock(config=self.path, now=True), cf.load_config(self.path)
        pid_file = cf.PidFile(self.path)
        with mock.patch('claude_failover.pid_namespace', return_value='pid:[1]'):
            self.assertTrue(pid_file.acquire())
            pid_file.write([4080])
        self.addCleanup(pid_file.release)
        with open(pid_file.path, 'rb') as file:
            texts = (file.read(), b'{"pid": 1, "ports": [4080], "namespace": null}',
                     b'1')  # the last is 1.0.0's
        for text in texts:
            with open(pid_file.path, 'wb') as file:
                file.write(text)
            self.assertEqual(cf.access_fields(cf.find_running(self.path), config, 4080), {})
            with mock.patch('os.kill') as kill:
                for command in (cf.cmd_stop, cf.cmd_restart, cf.cmd_status):
                    with self.subTest(text=text, command=command), \
                            self.assertRaisesRegex(cf.FailoverError, 'another container'):
                        command(options)
            kill.assert_not_called()

    def test_stop_waits_for_running_answers_unless_it_is_told_not_to(self):
        asked = threading.Event()

        def never_answer(sock, number):
            read_request(sock)
            asked.set()
            sock.recv(1)
        self.write_config(
            self.free_port_document('a', anthropicBaseUrl=RawServer(self, never_answer).url))
        _, done = self.daemon()
        self.assertEqual(done.stderr, '')
        with connect(self.read_config()['profiles']['default']['port']) as sock:
            sock.sendall(request_bytes(body=messages_body()))
            self.assertTrue(asked.wait(PATIENCE_S))
            process = subprocess.Popen([sys.executable, SCRIPT, 'stop'], stderr=subprocess.PIPE,
                                       stdout=subprocess.DEVNULL, text=True, env=dict(os.environ))
            self.addCleanup(process.stderr.close)
            self.assertIn('stop --now', process.stderr.readline())
            self.assertEqual(self.run_command('stop', '--now').returncode, 0)
            self.assertEqual(process.wait(PATIENCE_S), 0)

    def pretend_systemctl(self, script):
        """A systemctl that runs a shell script; the path of a file for what it notes."""
        folder, notes = os.path.join(self.folder, 'bin'), os.path.join(self.folder, 'notes')
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, 'systemctl'), 'w') as file:
            file.write(f'#!/bin/sh\necho "$@" >> "{notes}"\n{script}\n')
        os.chmod(os.path.join(folder, 'systemctl'), 0o755)
        os.environ['PATH'] = f'{folder}:{os.environ["PATH"]}'
        return notes

    @needs('/proc')                   # Linux
    def test_it_is_set_up_to_start_at_login_and_not_any_more(self):
        self.write_config(self.free_port_document('a'))
        notes = self.pretend_systemctl('')
        unit = os.path.join(self.folder, '.config', 'systemd', 'user', 'claude-failover.service')
        self.assertIn('it does not start at login', self.run_with_proxy('status'))
        first = self.run_command('setup', '--autostart')
        self.assertEqual((first.returncode, first.stderr), (0, ''))
        self.assertIn(f'Wrote {unit}', first.stdout)
        self.assertIn('loginctl enable-linger', first.stdout)
        with open(notes) as file:
            self.assertEqual(file.read().replace(' claude-failover.service', ''),
                             '--user daemon-reload\n--user enable\n--user stop\n--user start\n')
        self.assertIn('started by systemd, as at each login',
                      self.run_with_proxy('status', CLAUDE_FAILOVER_STARTED_BY='systemd'))
        again = self.run_with_proxy('setup', '--autostart', CLAUDE_FAILOVER_STARTED_BY='systemd')
        self.assertIn('nothing was changed', again)
        removed = self.run_command('setup', '--remove-autostart')
        self.assertEqual((removed.returncode, removed.stderr, os.path.exists(unit)),
                         (0, '', False))
        self.assertIn('nothing was changed',
                      self.run_command('setup', '--remove-autostart').stdout)

    def run_with_proxy(self, *command, **environ):
        """What a command says while a proxy runs that was started with some environment."""
        process, _, _ = self.start(**environ)
        said = self.run_command(*command).stdout
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)
        return said

    @needs('/proc')
    def test_without_a_manager_the_file_is_written_and_what_is_running_goes_on(self):
        self.write_config(self.free_port_document('a'))
        self.pretend_systemctl('echo no bus >&2; exit 1')
        pid, _ = self.daemon()
        done = self.run_command('setup', '--autostart')
        self.assertEqual(done.returncode, 0)
        self.assertIn('(systemctl: no bus); where it runs, do: systemctl --user daemon-reload && '
                      'systemctl --user enable', done.stderr)
        self.assertEqual(cf.PidFile(self.path).holder().pid, pid)

    @needs('/proc')
    def test_a_proxy_that_runs_by_hand_goes_over_to_the_manager(self):
        self.write_config(self.free_port_document('a'))
        self.pretend_systemctl('case "$*" in *start*) echo broken >&2; exit 1;; esac')
        pid, _ = self.daemon()
        done = self.run_command('setup', '--autostart')
        self.assertIn(f'(pid {pid}) was stopped', done.stdout)
        self.assertEqual((done.returncode, done.stderr),
                         (1, 'claude-failover: systemd did not start it: systemctl: broken\n'))
        self.assertIsNone(cf.PidFile(self.path).holder())

    @needs('/proc')
    def test_a_proxy_that_a_manager_started_is_restarted_by_it(self):
        self.write_config(self.free_port_document('a'))
        notes = self.pretend_systemctl('')
        self.run_command('setup', '--autostart')
        os.unlink(notes)
        printed = self.run_with_proxy('restart', CLAUDE_FAILOVER_STARTED_BY='systemd')
        self.assertEqual(printed, 'systemd has started it again.\n')
        with open(notes) as file:
            self.assertEqual(file.read(), '--user restart claude-failover.service\n')

    def test_tools_are_set_up_and_given_back_by_command(self):
        self.write_config({**self.free_port_document('a'), 'accessToken': 'open-sesame'})
        port = self.read_config()['profiles']['default']['port']
        zshrc = os.path.join(self.folder, '.zshrc')
        with open(zshrc, 'w') as file:
            file.write(f'export KEY={token_of("z")}\n')
        dry = self.run_command('setup', '--dry-run', '--only', 'claude-code', 'zsh')
        self.assertEqual((dry.returncode, dry.stderr), (0, ''))
        self.assertIn(f"+export ANTHROPIC_BASE_URL='http://localhost:{port}'", dry.stdout)
        for secret in ('sesame', '0123456789'):
            self.assertNotIn(secret, dry.stdout)
        done = self.run_command('setup', SHELL='/bin/zsh')
        self.assertEqual((done.returncode, done.stderr), (0, ''))
        self.assertRegex(done.stdout,
                         rf'zsh +~/.zshrc +now uses http://localhost:{port} \(in new terminals\)')
        self.assertNotIn('fish', done.stdout)
        self.assertIn('set ANTHROPIC_AUTH_TOKEN to it yourself', done.stdout)
        self.assertIn('setup --undo', done.stdout)
        self.assertIn(f'uses http://localhost:{port} already',
                      self.run_command('setup', '--skip', 'bash').stdout)
        self.write_config('{ broken')                 # no reason to be stuck
        undone = self.run_command('setup', '--undo')
        self.assertEqual((undone.returncode, undone.stderr), (0, ''))
        with open(zshrc) as file:
            self.assertEqual(file.read(), f'export KEY={token_of("z")}\n')

    def test_setup_says_what_it_leaves_alone_and_goes_on_with_the_rest(self):
        self.write_config(self.free_port_document('a'))
        os.mkdir(os.path.join(self.folder, '.claude'))
        with open(os.path.join(self.folder, '.claude', 'settings.json'), 'w') as file:
            file.write('// mine')
        os.mkdir(os.path.join(self.folder, '.cursor'))
        done = self.run_command('setup', '--only', 'claude-code', 'zsh')
        self.assertEqual(done.returncode, 1)
        self.assertIn('Claude Code: ~/.claude/settings.json is not valid JSON', done.stderr)
        self.assertRegex(done.stdout, 'zsh +~/.zshrc +now uses')
        self.assertIn('Cursor cannot use a proxy on this machine', done.stdout)
        for arguments, words in ((('--profile', 'nope'), "no profile 'nope'. There are: default"),
                                 (('--undo', '--autostart'), 'only one'),
                                 (('--only', 'emacs'), 'invalid choice')):
            done = self.run_command('setup', *arguments)
            self.assertEqual((done.returncode, done.stdout), (2, ''))
            self.assertIn(words, done.stderr)

    def test_a_profile_whose_port_the_system_chose_is_set_up_while_it_runs(self):
        self.write_config(make_document('a'))
        self.assertIn('port 0', self.run_command('setup').stderr)
        self.assertIn(f'http://localhost:{self.start()[1]} (in new',
                      self.run_command('setup', '--only', 'zsh').stdout)

    def test_completions_name_every_command(self):
        for shell in ('bash', 'zsh', 'fish'):
            printed = self.run_command('completion', shell).stdout
            for command in cf.COMMANDS:
                self.assertIn(command.name, printed)
        check = (
            "source /dev/stdin; COMP_WORDS=(claude-failover doc); COMP_CWORD=1; "
            "compgen -W \"$(complete -p claude-failover | sed -E \"s/.*'(.*)'.*/\\1/\")\" doc")
        done = subprocess.run(['bash', '-c', check],
                              input=self.run_command('completion', 'bash').stdout,
                              capture_output=True, text=True)
        self.assertEqual((done.stdout, done.stderr), ('doctor\n', ''))

    def test_settings_are_read_and_written(self):
        self.write_config(make_document('a'))
        for arguments, printed in (
                (('--path',), self.path),
                (('get', 'queueWaitMs'), '90000'), (('get', 'logLevel'), 'info'),
                (('set', 'queueWaitMs', '5'), 'queueWaitMs is set.'),
                (('get', 'queueWaitMs'), '5'), (('set', 'logLevel', 'debug'), 'logLevel is set.'),
                (('set', 'queueWaitMs', 'null'), 'queueWaitMs is the default again.'),
                (('set', 'modelFallback', '{"a": "b"}'), 'modelFallback is set.'),
                (('get', 'modelFallback'), '{"a": "b"}')):
            done = self.run_command('config', *arguments)
            self.assertEqual((done.returncode, done.stdout, done.stderr), (0, printed + '\n', ''),
                             arguments)
        self.assertEqual({name: self.read_config().get(name)
                          for name in ('queueWaitMs', 'logLevel')},
                         {'queueWaitMs': None, 'logLevel': 'debug'})
        done = self.run_command('config', 'set', 'accessToken', '-',
                                stdin='my-secret-access-token-0123456789abcdefg\n')
        self.assertIn(f'Have Claude Code present it: python3 {SCRIPT} setup', done.stdout)
        listed = self.run_command('config', 'get').stdout
        self.assertEqual((json.loads(listed)['logLevel'], 'my-secret' in listed), ('debug', False))

    def test_a_wrong_setting_is_one_line_and_changes_nothing(self):
        self.write_config(make_document('a'))
        for arguments, words in (
                (('set', 'queueWaitMs', 'soon'), 'queueWaitMs must be a whole number'),
                (('set', 'queueWaitMs'), 'VALUE'), (('set', 'keys', '{}'), "no setting 'keys'"),
                (('get', 'nope'), 'queueWaitMs'), (('put', 'x'), 'choice')):
            done = self.run_command('config', *arguments)
            self.assertEqual((done.returncode, done.stdout), (2, ''), arguments)
            self.assertIn(words, done.stderr)
        self.assertEqual(self.read_config(), make_document('a'))

    def test_the_dashboard_is_opened_only_where_a_browser_has_a_window(self):
        with mock.patch('webbrowser.open', return_value=True) as opened, \
                mock.patch('sys.platform', 'linux'):
            with mock.patch('os.uname', return_value=mock.Mock(release='6.1')):
                self.assertFalse(cf.open_browser('http://x'))
                os.environ['DISPLAY'] = ':0'
                self.assertTrue(cf.open_browser('http://x'))
            with mock.patch('os.uname',
                            return_value=mock.Mock(release='5.15-microsoft-standard')), \
                    mock.patch('subprocess.call') as call:
                self.assertTrue(cf.open_browser('http://x'))
            self.assertEqual((opened.call_count, call.call_args.args[0]),
                             (1, ['explorer.exe', 'http://x']))
        self.write_config(self.free_port_document())
        self.assertIn('not running', self.run_command('config').stderr)

    def test_without_a_key_start_says_how_to_add_one(self):
        self.write_config(self.free_port_document())
        process, _, printed = self.start()
        line = process.stdout.readline() + process.stdout.readline()
        self.assertIn('0 Anthropic', printed)
        self.assertIn(f'python3 {SCRIPT} add-key', line)

    def test_the_first_signal_waits_for_running_answers_and_the_second_does_not(self):
        asked = threading.Event()

        def never_answer(sock, number):
            read_request(sock)
            asked.set()
            sock.recv(1)
        upstream = RawServer(self, never_answer)
        self.write_config(self.free_port_document('a', anthropicBaseUrl=upstream.url))
        process, port, _ = self.start()
        with connect(port) as sock:
            sock.sendall(request_bytes(body=messages_body()))
            self.assertTrue(asked.wait(PATIENCE_S))
            process.send_signal(signal.SIGINT)
            while self.accepts(port):
                pass
            self.assertIsNone(process.poll())
            process.send_signal(signal.SIGINT)
            self.assertEqual(process.wait(PATIENCE_S), 1)

    def test_after_the_first_signal_a_running_answer_is_whole_and_the_exit_is_clean(self):
        anthropic = PretendAnthropic(self)
        anthropic.hold = threading.Event()
        self.write_config(self.free_port_document('a', anthropicBaseUrl=anthropic.url))
        process, port, _ = self.start()
        answers = queue.Queue()
        threading.Thread(target=lambda: answers.put(self.ask(port, 'POST', cf.MESSAGES_PATH,
                                                             messages_body(stream=True))),
                         daemon=True).start()
        self.assertTrue(anthropic.asked_for.acquire(timeout=PATIENCE_S))
        process.send_signal(signal.SIGTERM)
        while self.accepts(port):
            pass
        self.assertEqual(self.run_command('health').returncode, 1)         # it takes its time, too
        self.assertIsNone(process.poll())
        anthropic.hold.set()
        answered = answers.get(timeout=PATIENCE_S)
        self.assertEqual((answered.status, answered.events, answered.is_complete),
                         (200, stream_events(), True))
        self.assertEqual(process.wait(PATIENCE_S), 0)

    def accepts(self, port):
        with contextlib.suppress(ConnectionError), socket.create_connection(('127.0.0.1', port)):
            return True
        return False

    def test_an_early_signal_ends_it_cleanly(self):
        self.write_config(self.free_port_document('a'))
        process, _, _ = self.start()
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(PATIENCE_S), 0)

    def test_status_finds_the_running_proxy_whatever_became_of_its_file(self):
        self.write_config(make_document('a'))         # port 0: only the system knows it
        process, port, _ = self.start()
        self.assertIn(f'http://localhost:{port}', self.run_command('status').stdout)
        added = self.run_command('add-key', '-', stdin=token_of('b') + '\n')
        self.assertIn('uses it within 5 s', added.stdout)
        states = {key['id']: key['state']
                  for key in json.loads(self.run_command('list-keys', '--json').stdout)['keys']}
        self.assertEqual(states, {'a': 'ready', 'key': 'not loaded yet'})
        self.write_config('{ broken')
        for command in ('status', 'health'):
            self.assertIn(str(process.pid), self.run_command(command).stdout)
        os.unlink(self.path)
        self.assertIn(f'pid {process.pid}', self.run_command('status').stdout)

    def test_status_says_what_is_used_when_it_ends_and_who_shares_it(self):
        thursday, now = '2026-03-05T09:00:00.000Z', cf.datetime(2026, 3, 3, 1, 0)

        def window(name, used, length_s, spent_at=None, pace=None):
            return {'name': name, 'used': used, 'length_s': length_s, 'resets_at': thursday,
                    'spent_at': spent_at, 'pace': pace}

        def key(id, *windows, siblings=()):
            return {'id': id, 'ref': id, 'provider': 'anthropic', 'token': 'x', 'state': 'ready',
                    'answers': 1, 'problem': None, 'windows': windows, 'siblings': siblings}

        def cooling(key, server, asked_at):
            return {'key': key, 'server': server, 'model': None, 'remaining_ms': 60_000,
                    'status': 429, 'words': 'x', 'message': '', 'needs_attention': False,
                    'until': '2026-03-03T04:55:00.000Z', 'asked_at': asked_at}
        health = {
            'keys': [key('a', window('5h', 0.5, 18_000, '2026-03-03T03:10:00.000Z', 2),
                         window('7d', 0.42, 604_800, pace=0.8),
                         window('requests', 0.5, 60), siblings=['b']), key('b', siblings=['a'])],
            'cooldowns': [cooling('a', None, '2026-03-03T01:55:00.000Z'),
                          cooling(None, 'https://x.test', '2026-03-03T04:55:00.000Z')]}
        self.addCleanup(time.tzset)
        with mock.patch.object(cf, 'datetime', mock.Mock(wraps=cf.datetime, now=lambda: now)), \
                mock.patch.dict(os.environ, TZ='UTC'), \
                contextlib.redirect_stdout(io.StringIO()) as said:
            time.tzset()
            cf.say_keys(health)
            self.assertEqual(cf.local_moment('2026-03-13T09:00:00.000Z'), '13 Mar 09:00')
        for line in ('  a: 5h 50 %, resets Thu 09:00, at this pace until 03:10',
                     '  a: 7d 42 %, resets Thu 09:00, at this pace 80 % by then',
                     '  b adds no capacity a minute: it is of the organization of a',
                     '  a cools for 60 s: 429 x, resets 04:55; tried again at 01:55',
                     '  https://x.test cools for 60 s: 429 x'):
            self.assertIn(line, said.getvalue().splitlines())

    def test_conversations_are_listed_as_a_table_and_as_json(self):
        self.write_config(self.free_port_document('a', accessToken='sesame',
                                                  anthropicBaseUrl=PretendAnthropic(self).url))
        _, port, _ = self.start()
        self.assertEqual(self.run_command('status', '--conversations').stdout,
                         'No conversation has a living cache.\n')
        with connect(port) as sock:
            sock.sendall(request_bytes(body=messages_body(), connection='close',
                                       x_api_key='sesame', x_claude_code_session_id='one'))
            self.assertIn(b'200 OK', read_all(sock))
        [view] = json.loads(self.run_command('status', '--conversations', '--json').stdout)
        heads, row = map(str.split,
                         self.run_command('status', '--conversations').stdout.splitlines())
        self.assertEqual((heads[:4], row[:4]), (['CONVERSATION', 'CLIENT', 'MODEL', 'KEY'],
                                                [view['conversation'], 'other', OPUS, 'a']))

    def test_start_names_keys_that_cannot_be_used_and_unknown_fields(self):
        document = self.free_port_document('a', queueWaitMS=1)
        document['keys']['a']['token'] = 'env:NOT_SET_ANYWHERE'
        self.write_config(document)
        process, _, _ = self.start()
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)
        told = process.stderr.read()
        self.assertIn('key anthropic:a cannot be used: environment variable NOT_SET_ANYWHERE is '
                      'not set', told)
        self.assertIn('field queueWaitMS', told)

    def test_output_that_is_closed_or_full_is_no_traceback(self):
        for redirection, status in (('>&-', 0), ('>/dev/full', 1), ('| head -c 0', 0)):
            if redirection == '>/dev/full' and not os.path.exists('/dev/full'):
                continue
            done = subprocess.run(['sh', '-c',
                                   f'{sys.executable} {SCRIPT} list-keys {redirection}'],
                                  capture_output=True, text=True, env=dict(os.environ), timeout=60)
            self.assertEqual((done.returncode, 'Traceback' in done.stderr), (status, False),
                             done.stderr)
        self.run_command('add-key', 'env:X', 'B\u00fcro')
        self.assertEqual(run_process('list-keys', PYTHONIOENCODING='ascii').returncode, 0)

    def test_the_end_of_input_at_the_prompt_adds_nothing(self):
        options = mock.Mock(token=None)
        with mock.patch('sys.stdin', mock.Mock(isatty=lambda: True)), \
                mock.patch('getpass.getpass', side_effect=EOFError), \
                self.assertRaisesRegex(cf.UsageError, 'nothing was added'):
            cf.read_new_token(options)

    def test_log_lines_read_well_and_cannot_steer_the_terminal(self):
        folder = os.path.join(os.path.dirname(self.path), 'logs')
        os.makedirs(folder)
        request = {'time': '2026-03-01T12:00:00.000Z', 'level': 'info', 'event': 'request',
                   'method': 'POST', 'path': '/v1/messages', 'model': 'evil\x1b[31m',
                   'status': 200, 'duration_ms': 5,
                   'attempts': [{'key': 'a', 'status': 429}, {'key': 'b', 'status': 200}]}
        with open(os.path.join(folder, 'claude-failover.log'), 'w') as file:
            file.write('{"event": "request", "attempts": [null, {}, 5]}\n'
                       '{"event": "request", "attempts": 5}\n')
            file.write(json.dumps(request) + '\nnot json \x1b[2J\n')
        for arguments in (('logs',), ('logs', '--json')):
            self.assertNotIn('\x1b', self.run_command(*arguments).stdout)
        printed = run_process('logs', TZ='UTC-3').stdout
        self.assertIn('2026-03-01 15:00:00 info  request POST /v1/messages', printed)
        self.assertIn('200 in 5 ms: a 429 -> b 200', printed)
        self.assertEqual(self.run_command('logs', '-n', '1').stdout.count('\n'), 1)

    def test_hostile_texts_cannot_steer_the_terminal(self):
        steer = '\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202e\n'

        def play(sock, number):
            while read_request(sock):
                error = json.dumps(api_error('rate_limit_error',
                                             f'slow{steer} down {token_of("a")}')).encode()
                sock.sendall(plain_answer(error, '429 Too Many Requests', 'retry-after: 3000\r\n'))
        document = self.free_port_document('a', anthropicBaseUrl=RawServer(self, play).url,
                                           queueWaitMs=0, **{f'odd{steer}': 1})
        document['keys']['a']['label'] = f'My{steer}key'
        document['keys']['b'] = {'token': f'file:/no{steer}where'}
        self.write_config(document)
        process, port, _ = self.start()
        self.assertEqual(self.ask(port, 'POST', cf.MESSAGES_PATH,
                                  messages_body(model=f'claude{steer}')).status, 429)
        told = []
        for command in (('status',), ('list-keys',), ('doctor',)):
            done = run_process(*command)
            told += [done.stdout, done.stderr]
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)
        told += [process.stdout.read(), process.stderr.read(), self.run_command('logs').stdout,
                 self.run_command('logs', '--json').stdout]
        for text in told:
            self.assertNotRegex(text, '[^\n -~\xa0-\ufffd]|\u202e|0123456789')
        self.assertIn('429', told[-2])

    def test_logs_follow_the_file_through_a_rotation(self):
        folder = os.path.join(os.path.dirname(self.path), 'logs')
        log = cf.JsonLog(os.path.join(folder, 'claude-failover.log'), max_bytes=4096)
        self.addCleanup(log.close)
        log.info('first')
        process = subprocess.Popen([sys.executable, SCRIPT, 'logs', '-f'], stdout=subprocess.PIPE,
                                   text=True, env=dict(os.environ))
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait, PATIENCE_S)
        self.addCleanup(process.kill)
        self.assertIn('first', process.stdout.readline())
        log.info('second')
        self.assertIn('second', process.stdout.readline())
        log.info('long', text='x' * 5000)
        self.assertIn('long', process.stdout.readline())
        log.info('after')
        self.assertIn('after', process.stdout.readline())
        printed = self.run_command('logs').stdout     # those of the rotated file first
        self.assertEqual(re.findall('first|second|long|after', printed),
                         ['first', 'second', 'long', 'after'])

    def test_a_crash_tells_where_and_no_value(self):
        program = f"""
import sys, threading
sys.path.insert(0, {HERE!r})
import claude_failover as cf
def fail(*arguments):
    raise ValueError("Invalid header value b'secret {token_of('a')}'")
class Odd:
    def __del__(self):
        fail()
def fail_everywhere():
    threading.Thread(target=fail).start()
    Odd()
    threading.Thread(target=sys.exit).start()
    fail()
cf.argument_parser = fail_everywhere
cf.main(['status'])
"""
        done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True,
                              timeout=60)
        self.assertEqual((done.returncode, done.stdout), (1, ''))
        self.assertEqual(re.findall('ValueError at fail:', done.stderr),
                         ['ValueError at fail:'] * 3, done.stderr)
        self.assertNotRegex(done.stderr, 'secret|0123456789|Traceback|SystemExit')

    @needs('/proc/self/limits')       # Linux
    def test_the_running_proxy_dumps_no_memory_and_makes_no_file_that_others_can_read(self):
        self.write_config(self.free_port_document('a'))
        process, _, _ = self.start()
        with open(f'/proc/{process.pid}/limits') as file:
            self.assertRegex(file.read(), r'Max core file size +0 +0 ')
        with open(f'/proc/{process.pid}/status') as file:
            self.assertIn('Umask:\t0077\n', file.read())
        for folder, _, names in os.walk(os.path.dirname(self.path)):
            for path in (folder, *(os.path.join(folder, name) for name in names)):
                self.assertEqual(stat.S_IMODE(os.stat(path).st_mode) & 0o077, 0, path)

    @needs('/proc/self/limits')
    def test_there_are_descriptors_for_as_many_connections_as_are_let_in(self):
        import resource
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.write_config(self.free_port_document('a'))
        process, _, _ = self.start(executable=('sh', '-c', 'ulimit -S -n 256 && exec "$@"', 'sh',
                                               sys.executable))
        wanted = (2 * cf.MAX_CONNECTIONS if hard == resource.RLIM_INFINITY
                  else min(2 * cf.MAX_CONNECTIONS, hard))
        with open(f'/proc/{process.pid}/limits') as file:
            self.assertGreaterEqual(int(re.search(r'Max open files +(\d+)', file.read()).group(1)),
                                    wanted)

    def ask(self, port, method, path, body=None):
        """One request to a running proxy, on a connection of its own."""
        with connect(port) as sock:
            sock.sendall(request_bytes(method, path, body, connection='close'))
            return Answered(read_all(sock))

    @needs('/bin/sh')
    def test_a_disk_without_room_costs_lines_of_the_log_and_no_answers(self):
        self.write_config(self.free_port_document('a',
                                                  anthropicBaseUrl=PretendAnthropic(self).url))
        before = self.read_config()
        # Files that may not grow are as near to a full disk as a program can be brought anywhere.
        process, port, _ = self.start(executable=('sh', '-c', 'ulimit -f 4 && exec "$@"', 'sh',
                                                  sys.executable))
        problems, deadline = [], time.monotonic() + PATIENCE_S
        # Asked once: a shorter line may fit again.
        while not problems and time.monotonic() < deadline:
            self.assertEqual(self.ask(port, 'POST', cf.MESSAGES_PATH, messages_body()).status, 200)
            problems = self.ask(port, 'GET', '/health').json['problems']
        log = os.path.join(os.path.dirname(self.path), 'logs', 'claude-failover.log')
        self.assertEqual(problems, [f'The log {log} cannot be written.'])
        too_large = {'modelFallback': {f'model-{number}': 'x' * 100 for number in range(50)}}
        self.assertEqual(self.ask(port, 'PUT', '/api/config', too_large).status, 507)
        self.assertEqual(self.read_config(), before)
        self.assertEqual(self.ask(port, 'POST', cf.MESSAGES_PATH, messages_body()).status, 200)
        process.send_signal(signal.SIGTERM)
        self.assertEqual((process.wait(PATIENCE_S), process.stderr.read()), (0, ''))
        with open(log) as file:
            self.assertGreater(len([json.loads(line) for line in file]), 1)       # whole ones

    def test_colours_are_for_terminals_that_want_them(self):
        for is_terminal, environ, shown in ((True, {}, '\x1b[1mx\x1b[0m'),
                                            (True, {'NO_COLOR': '1'}, 'x'),
                                            (True, {'TERM': 'dumb'}, 'x'), (False, {}, 'x')):
            with mock.patch('sys.stdout',
                            mock.Mock(isatty=lambda is_terminal=is_terminal: is_terminal)):
                self.assertEqual(cf.paint('bold', 'x', environ), shown)


# ==============================================================================
# Promises
# ==============================================================================

def source_of(name):
    with open(os.path.join(HERE, name), encoding='utf-8') as file:
        return file.read()


class PromisesTest(unittest.TestCase):
    """What the project says of itself, kept true."""

    def test_no_name_is_given_twice_in_one_place(self):
        """The later of two would take the first one's place, for all that call it."""
        with open(SCRIPT, encoding='utf-8') as file:
            tree = ast.parse(file.read())
        for place in [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]:
            names = collections.Counter(node.name for node in place.body
                                        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
                                        and not any('setter' in ast.dump(decorator)
                                                    for decorator in node.decorator_list))
            self.assertEqual([name for name, count in names.items() if count > 1], [])

    def test_the_section_map_equals_the_banners(self):
        banners = re.findall(r'^# ={10,}\n# ([^\n]+)\n# ={10,}',
                             source_of('claude_failover.py'), re.M)
        indented = re.findall(r'^    (\S[^\n]*?)(?:  |$)',
                              cf.__doc__.split('prints them):')[1].split('The first')[0], re.M)
        self.assertEqual(indented, banners)

    def test_a_section_uses_only_what_stands_above_it(self):
        tree = ast.parse(source_of('claude_failover.py'))
        first_line = {node.name: node.lineno for node in tree.body if hasattr(node, 'name')}
        banners = [number
                   for number, line in enumerate(source_of('claude_failover.py').splitlines(), 1)
                   if line.startswith('# ====')]

        def section(line):
            return sum(banner <= line for banner in banners)
        down = [(node.name, used.id) for node in tree.body if hasattr(node, 'name')
                for used in ast.walk(node) if isinstance(used, ast.Name)
                and section(first_line.get(used.id, 0)) > section(node.lineno)]
        self.assertEqual(down, [])

    def test_the_pure_core_knows_no_clock_file_socket_or_thread(self):
        source = source_of('claude_failover.py')
        core = source[source.index('\n# Configuration\n'):source.index('\n# Cooldowns\n')]
        self.assertEqual(re.findall(r'\b(?:time|os|socket|threading|select)\.\w+|\bopen\(', core),
                         [])

    def test_the_readme_tells_every_setting_command_and_rule(self):
        readme = source_of('README.md')
        for setting in cf.SETTINGS:
            default = 'none' if setting.default is None else json.dumps(setting.default)
            row = next((line for line in readme.splitlines()
                        if line.startswith(f'| `{setting.name}` ')), '')
            self.assertIn(setting.help, row)
            if not isinstance(setting.default, dict):
                self.assertIn(f'`{default}`' if setting.default is not None else 'none', row)
        for command in cf.COMMANDS:
            self.assertRegex(readme, rf'\| `{command.name}\b[^|]*\| {re.escape(command.help)} \|')
        for rule in (*cf.RULES, *cf.OPENAI_RULES, cf.UNREACHABLE, cf.RESET, cf.TIMED_OUT,
                     cf.NO_TOKEN, cf.UNTRANSLATABLE, cf.EMPTY_STREAM, cf.NO_MESSAGE, cf.BROKE_OFF):
            if rule.name not in ('answered', 'relayed'):
                self.assertIn(f'`{rule.name}`', readme)
        self.assertIn('python3 test_claude_failover.py', readme)

    def test_the_configuration_in_the_readme_is_valid(self):
        block = re.search(r'```json\n(.*?)```', source_of('README.md'), re.S).group(1)
        self.assertEqual(len(cf.parse_config(json.loads(block)).keys), 2)

    def test_the_project_is_five_files(self):
        visible = [name for name in os.listdir(HERE) if not name.startswith(('.', '__'))]
        self.assertLessEqual(set(visible), {'claude_failover.py', 'dashboard.html',
                                            'test_claude_failover.py', 'README.md', 'LICENSE'})

    def test_the_dashboard_is_one_small_page_in_which_data_is_never_markup(self):
        page = source_of('dashboard.html')
        self.assertLess(len(page.encode()), 120_000)
        self.assertEqual(re.findall(r'innerHTML|outerHTML|insertAdjacentHTML|document\.write|'
                                    r'eval\(|\son[a-z]+="|\sstyle="', page), [])
        urls = set(re.findall(r'https?://[^\s\'"`<>)]+', page)) - {'http://www.w3.org/2000/svg'}
        self.assertEqual([url for url in urls if not url.startswith('http://localhost')], [])
        self.assertEqual((page.count('<script'), page.count('<style')), (1, 1))

    def test_only_the_standard_library_is_imported(self):
        tree = ast.parse(source_of('claude_failover.py'))
        names = {alias.name.split('.')[0] for node in ast.walk(tree)
                 if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module.split('.')[0] for node in ast.walk(tree)
                  if isinstance(node, ast.ImportFrom)}
        if hasattr(sys, 'stdlib_module_names'):       # Python 3.10
            self.assertEqual(names - sys.stdlib_module_names, set())

    def test_every_text_of_a_rule_is_one_that_a_person_can_read(self):
        for rule in (*cf.RULES, cf.UNREACHABLE, cf.RESET, cf.TIMED_OUT, cf.NO_TOKEN):
            self.assertRegex(rule.name, r'^[a-z_]+$')


# ==============================================================================
# The dashboard in a real browser
# ==============================================================================

CHROMIUM, CHROMEDRIVER = '/usr/bin/chromium', '/usr/bin/chromedriver'
ELEMENT = 'element-6066-11e4-a52e-4f735466cecf'       # WebDriver's name for a reference
#: Headless, offline but for this machine, and as root in CI.
CHROMIUM_OPTIONS = ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-quic',
                    '--no-first-run', '--disable-background-networking',
                    '--disable-component-update', '--disable-sync', '--disable-dev-shm-usage')


class Browser:
    """Chromium, driven by WebDriver (W3C).  Elements are told by CSS selectors."""

    def __init__(self, folder):
        self._driver = subprocess.Popen([CHROMEDRIVER, '--port=0'], stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True,
                                        env={'HOME': folder, 'PATH': os.environ['PATH'],
                                             'LANG': 'C.UTF-8', 'TZ': 'UTC'})
        started = (re.search(r'started successfully on port (\d+)', line)
                   for line in self._driver.stdout)
        self._port = next(int(match.group(1)) for match in started if match)
        options = {'binary': CHROMIUM,
                   'args': [*CHROMIUM_OPTIONS, f'--user-data-dir={folder}/chromium']}
        wanted = {'browserName': 'chrome', 'goog:chromeOptions': options,
                  'goog:loggingPrefs': {'browser': 'ALL', 'performance': 'ALL'}}
        self._session = ''
        self._session = '/session/' + self._ask('POST', '/session', {
            'capabilities': {'alwaysMatch': wanted}})['sessionId']

    def close(self):
        self._ask('DELETE', '')
        self._driver.terminate()
        self._driver.wait(PATIENCE_S)
        self._driver.stdout.close()

    def _ask(self, method, path, body=None):
        connection = http.client.HTTPConnection('127.0.0.1', self._port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, self._session + path,
                               json.dumps(body) if body is not None else None)
            value = json.loads(connection.getresponse().read())['value']
        if isinstance(value, dict) and 'error' in value:
            raise AssertionError(f'{path}: {value["error"]}: {value["message"]}')
        return value

    def go(self, url):
        self._ask('POST', '/url', {'url': url})

    def run(self, script, *arguments):
        """What a JavaScript function's body returns."""
        return self._ask('POST', '/execute/sync', {'script': script, 'args': list(arguments)})

    def until(self, condition, *arguments):
        """Waits until a JavaScript expression of `a` (the arguments) is true; its value.  It is
        looked at whenever the page draws, by the page itself."""
        script = f'''
            const [done, a] = [arguments[arguments.length - 1], arguments];
            const end = performance.now() + {PATIENCE_S * 1000};
            const look = () => {{
                let value = null;
                try {{ value = {condition}; }} catch (error) {{ value = null; }}
                if (value || performance.now() > end) done(value || null);
                else setTimeout(look, 10);
            }};
            look();'''
        value = self._ask('POST', '/execute/async', {'script': script, 'args': list(arguments)})
        if not value:
            raise AssertionError(f'never came true: {condition} {arguments}\n'
                                 f'{self.run("return document.body.innerText")[:2000]}')
        return value

    def _find(self, selector):
        self.until('document.querySelector(a[0])?.getClientRects().length', selector)
        return self._ask('POST', '/element', {'using': 'css selector', 'value': selector})[ELEMENT]

    def text(self, selector):
        return self._ask('GET', f'/element/{self._find(selector)}/text')

    def click(self, selector):
        self._ask('POST', f'/element/{self._find(selector)}/click', {})

    def fill(self, selector, text):
        element = self._find(selector)
        self._ask('POST', f'/element/{element}/clear', {})
        self._ask('POST', f'/element/{element}/value', {'text': text})

    def press(self, *keys):
        """Presses keys one after another, wherever the focus is: 'Tab', 'Enter', 'a' ..."""
        codes = [KEY_CODES.get(key, key) for key in keys]
        actions = [{'type': kind, 'value': code} for code in codes
                   for kind in ('keyDown', 'keyUp')]
        self._ask('POST', '/actions',
                  {'actions': [{'type': 'key', 'id': 'keyboard', 'actions': actions}]})

    def drag(self, selector, target):
        """Drags one element onto the lower half of another, as a hand does: in several moves."""
        start, end = (
            self.run('const r = document.querySelector(arguments[0]).getBoundingClientRect();'
                     'return [r.x + r.width / 2, r.y + r.height * arguments[1]].map(Math.round)',
                     *which) for which in ((selector, 0.5), (target, 0.8)))
        moves = [[start[i] + (end[i] - start[i]) * step // 8 for i in (0, 1)] for step in range(9)]
        actions = [{'type': 'pointerMove', 'duration': 0 if step == 0 else 20, 'x': x, 'y': y}
                   for step, (x, y) in enumerate(moves)]
        actions[1:1] = [{'type': 'pointerDown', 'button': 0}]
        actions.append({'type': 'pointerUp', 'button': 0})
        self._ask('POST', '/actions',
                  {'actions': [{'type': 'pointer', 'id': 'mouse',
                                'parameters': {'pointerType': 'mouse'}, 'actions': actions}]})

    def resize(self, width, height):
        self._ask('POST', '/goog/cdp/execute', {
            'cmd': 'Emulation.setDeviceMetricsOverride',
            'params': {'width': width, 'height': height, 'deviceScaleFactor': 1, 'mobile': False}})

    def prefer(self, scheme):
        """'light' or 'dark'."""
        self._ask('POST', '/goog/cdp/execute', {'cmd': 'Emulation.setEmulatedMedia', 'params': {
            'features': [{'name': 'prefers-color-scheme', 'value': scheme},
                         {'name': 'prefers-reduced-motion', 'value': 'reduce'}]}})

    def screenshot(self):
        return base64.b64decode(self._ask('GET', '/screenshot'))

    def logged(self, kind):
        """What the browser logged since it was last asked: 'browser' (the console) or
        'performance'."""
        return self._ask('POST', '/se/log', {'type': kind})


KEY_CODES = {'Tab': '\ue004', 'Enter': '\ue007', 'Escape': '\ue00c', 'Space': ' ',
             'ArrowUp': '\ue013', 'ArrowDown': '\ue015', 'Shift': '\ue008'}


CHROMIUM_FOUND = os.path.exists(CHROMIUM) and os.path.exists(CHROMEDRIVER)
PAGES = ('status', 'keys', 'profiles', 'fallback', 'setup', 'logs')
#: The least contrast of text and its background (WCAG 2.2, 1.4.3), measured of every text that is
#: shown.
CONTRAST_SCRIPT = '''
    const channel = (value) => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const parse = (color) => {
        const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number);
        return { rgb: [r, g, b], a };
    };
    const luminance = (rgb) => {
        const [r, g, b] = rgb.map((value) => channel(value / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const over = (top, under) => top.rgb.map((value, i) => value * top.a + under[i] * (1 - top.a));
    const backgroundOf = (element) => {
        const layers = [];
        for (let at = element; at; at = at.parentElement) {
            const color = parse(getComputedStyle(at).backgroundColor);
            layers.push(color);
            if (color.a === 1) break;
        }
        return layers.reverse().reduce((under, layer) => over(layer, under), [255, 255, 255]);
    };
    const low = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
        const element = node.parentElement;
        if (!node.data.trim() || !element.getClientRects().length) continue;
        if (element.closest('script, template, .tip, [aria-disabled="true"]')) continue;
        const under = backgroundOf(element);
        const color = over(parse(getComputedStyle(element).color), under);
        const [light, dark] = [luminance(color), luminance(under)].sort((a, b) => b - a);
        const ratio = (light + 0.05) / (dark + 0.05);
        if (ratio < 4.5) low.push([ratio.toFixed(2), node.data.trim().slice(0, 30)]);
    }
    return low;'''


@unittest.skipUnless(CHROMIUM_FOUND, 'chromium and chromium-driver are not installed')
class DashboardTest(ProgramTest):
    """The page in Chromium, on the running program."""

    @classmethod
    def setUpClass(cls):
        cls.folder_of_browser = tempfile.mkdtemp(prefix='failover-browser-')
        cls.addClassCleanup(shutil.rmtree, cls.folder_of_browser, ignore_errors=True)
        cls.browser = Browser(cls.folder_of_browser)
        cls.addClassCleanup(cls.browser.close)

    def setUp(self):
        super().setUp()
        patch = mock.patch.object(cf, 'STATUS_S', 0.05)
        patch.start()
        self.addCleanup(patch.stop)
        self.browser.resize(1440, 900)
        self.browser.prefer('light')
        self.expected_errors = 0    # lines that the browser itself writes of a 4xx or a lost proxy

    def tearDown(self):
        """No test leaves an error on the console, a violation of the policy or a request to
        another host."""
        self.browser.go('about:blank')        # before the program goes: nobody is to miss it
        lines = [line['message'] for line in self.browser.logged('browser')
                 if line['level'] != 'INFO' and '[DOM]' not in line['message']]
        self.assertEqual([line for line in lines if 'Failed to load resource' not in line
                          and 'net::ERR' not in line], [])
        self.assertLessEqual(len(lines), self.expected_errors)
        requests = [json.loads(line['message'])['message']
                    for line in self.browser.logged('performance')]
        urls = {request['params']['request']['url'] for request in requests
                if request['method'] == 'Network.requestWillBeSent'}
        self.assertEqual([url for url in urls if re.match('https?:|wss?:', url)
                          and not url.startswith('http://localhost:')], [])

    def open(self, page='status'):
        self.browser.go(f'http://localhost:{self.port}/dashboard/{page}')
        self.browser.until('state.status && state.config')

    def shown(self, text, selector='main'):
        """Waits until a text is shown."""
        return self.browser.until('document.querySelector(a[1]).innerText.includes(a[0])',
                                  text, selector)

    def dialog(self, action, *inputs):
        """Opens a dialog by its button, fills it in and sends it."""
        self.browser.click(action)
        for selector, text in inputs:
            self.browser.fill(f'dialog[open] {selector}', text)
        self.browser.click('dialog[open] [type="submit"]')

    def order(self, provider='anthropic'):
        return self.browser.run('return [...document.querySelectorAll(arguments[0])].map((row) => '
                                'row.dataset.id)', f'#keys-{provider} tbody tr')

    def note_windows(self, ref, **windows):
        """An answer of a key said so: window=(share, seconds to its reset)."""
        self.app.metrics.note_limits(ref, {'anthropic-organization-id': 'org-1', **{
            f'anthropic-ratelimit-unified-{name}-{field}': value
            for name, (used, left_s) in windows.items() for field, value in (
                ('utilization', str(used)), ('reset', str(int(time.time() + left_s))))}}, True)

    def test_limits_tell_their_pace_their_true_reset_and_who_shares_them(self):
        for ref in ('anthropic:a', 'anthropic:b'):
            self.note_windows(ref, **{'5h': (0.5, 4 * 3600), '7d': (0.42, 3 * 86_400),
                                      '7d_opus': (0.9, 3 * 86_400)})
        key = self.app.store.current.keys['anthropic:a']
        spent = cf.Outcome(next(rule for rule in cf.RULES if rule.name == 'window_spent'), 429,
                           'spent', 4 * 3600, ends_s=4 * 3600)
        self.app.cooldowns.cool(key, cf.Slot(key.ref, OPUS), spent, 3600)
        self.open('keys')
        for text in ('7 days opus', 'at this pace until', 'at this pace 74 % by then',
                     '; tried again at', 'Of the organization of', 'adds no capacity a minute'):
            self.shown(text)
        outcome = cf.Outcome(cf.UNREACHABLE._replace(strikes=1), None, 'no route', 60)
        self.app.cooldowns.cool(key, cf.Slot(key.ref, OPUS, server=self.anthropic.url),
                                outcome, 3600)
        self.open()
        self.shown(self.anthropic.url, '#cooldowns')
        self.shown('every key there', '#cooldowns')
        self.assertEqual(
            self.browser.run('return document.querySelectorAll("#cooldowns li").length'), 2)

    def test_conversations_are_a_table_once_there_are_any(self):
        self.open()
        self.assertIsNone(self.browser.run('return document.getElementById("conversations")'))
        for limited in ('', 'a'):
            self.anthropic.limited.update(limited)
            self.send(x_claude_code_session_id='one', user_agent='claude-cli/2')
        self.browser.until('document.getElementById("conversations")')
        [view] = self.app.failover.conversations.snapshot()
        for text in (view[0][:8], 'claude-code', 'rate limited'):
            self.shown(text, '#conversations')
        self.browser.click('[data-action="request-open"] button')
        self.shown('moved: rate limited', '#request-details')

    def test_a_profiles_strategy_is_chosen(self):
        self.open('profiles')
        self.browser.until('document.getElementById("strategy-default")')
        self.browser.run(
            'const select = document.getElementById("strategy-default"); select.value = "drain";'
            'select.dispatchEvent(new Event("change", {bubbles: true}))')
        self.browser.until('profileNamed("default").strategy === "drain"')
        self.browser.until('state.config.profiles[0].strategy === "drain"')
        self.assertEqual(self.read_config()['profiles']['default']['strategy'], 'drain')

    def test_two_seconds_tell_what_is_served_and_a_rotation_appears_live(self):
        self.open()
        self.shown('Serving from a', '#state-sentence')
        self.anthropic.limited.add('a')
        self.send()
        self.shown('Serving from b', '#state-sentence')
        self.assertRegex(self.browser.text('#state-sentence'),
                         r'a cools for claude-opus-5-5 until (\d+ \w+, )?\d\d:\d\d: rate limit')
        self.browser.until(
            'document.querySelector("#requests .chain").textContent === "a 429b 200"')
        self.assertIn('Serving from b', self.browser.run('return document.title'))
        self.assertEqual(self.browser.text('[data-number="rotations"] dd')[0], '1')
        self.browser.click('#requests tbody tr button')
        self.assertIn('rate limited', self.browser.text('#request-details'))
        self.browser.press('Escape')
        self.browser.click('#clear-all')
        self.shown('No key is cooling', '#cooldowns')
        self.shown('Serving from a', '#state-sentence')
        self.assertEqual(self.app.cooldowns.snapshot(), [])

    def test_one_cooldown_is_cleared_by_its_own_button(self):
        self.anthropic.limited.update('ab')
        self.send()
        self.open()
        self.shown('Every key is cooling; ', '#state-sentence')
        self.browser.click(f'.cooldown[data-id="anthropic:b {SONNET}"] button')
        self.browser.until('document.querySelectorAll(".cooldown").length === 3')
        self.assertNotIn(('anthropic:b', SONNET),
                         [(c.key.ref, c.model) for c, _ in self.app.cooldowns.snapshot()])

    def test_it_does_not_say_serving_while_no_key_of_either_provider_is_ready(self):
        openai = PretendOpenAI(self)
        self.reload({**make_document('a', anthropicBaseUrl=self.anthropic.url),
                     **with_openai('o', openaiBaseUrl=openai.url, queueWaitMs=0)})
        self.anthropic.limited.add('a')
        key = self.app.store.current.keys['openai:o']
        self.app.cooldowns.cool(key, cf.Slot(key.ref, 'gpt-5.4'),
                                cf.Outcome(rule('rate_limited'), 429, 'slow down', 50), 3600)
        self.send()
        self.open()
        self.shown('Every key is cooling; o with gpt-5.4 is back first, at ', '#state-sentence')
        self.shown('No answer yet · the last request failed at ', '.facts')
        self.assertNotIn('Serving', self.browser.run(
            'return document.title + document.querySelector(".hero").innerText'))
        self.app.cooldowns.clear(key.ref)
        self.shown('Serving from o with gpt-5.4 at OpenAI; a cools for claude-opus-5-5 until ',
                   '#state-sentence')

    def test_durations_read_as_on_the_command_line(self):
        self.open()
        seconds = [-5, 0, 0.5, 1.5, 2.5, 45.4, 99.4, 99.5, *range(100, 260, 10), 3599, 5969, 5970,
                   5999.6, 6030, *range(7_000, 400_000, 4321), 10**7]
        self.assertEqual(self.browser.run('return arguments[0].map(formatDuration)', seconds),
                         [cf.format_duration(s) for s in seconds])

    def test_a_cooldown_counts_down_without_a_word_of_the_proxy(self):
        self.anthropic.limited.add('a')
        self.send()
        self.open()
        self.browser.until(
            'document.querySelector(".cooldown > .small").innerText.includes("50 min")')
        self.browser.run('state.status.cooldowns[0].ends = Date.now() + 45_900; tick()')
        self.assertRegex(self.browser.text('.cooldown > .small'), ', 4[56] s$')

    def test_events_draw_four_times_a_second_at_the_most(self):
        self.open()
        waits = self.browser.run('''
            const [waits, after, now] = [[], window.setTimeout, performance.now];
            [window.setTimeout, performance.now] = [(_, ms) => waits.push(ms), () => 5000];
            [drawTimer, drawnAt] = [null, 4900];
            for (let news = 0; news < 50; news++) set();
            [window.setTimeout, performance.now] = [after, now];
            draw();
            return waits''')
        self.assertEqual(waits, [150])

    def test_a_key_is_added_tested_renamed_replaced_and_removed(self):
        self.open('keys')
        self.dialog('#add-key', ('#field-token', token_of('c')), ('#field-label', 'third'))
        self.browser.until('document.querySelector("tr[data-id=\\"anthropic:third\\"]")')
        row = 'tr[data-id="anthropic:third"]'
        self.anthropic.refused.add('c')
        self.browser.click(f'{row} [data-action="key-test"]')
        self.browser.until('document.querySelector(a[0])', f'{row} [data-result="refused"]')
        self.assertIn('Not accepted: 401 bad key', self.browser.text(f'{row} [data-result]'))
        self.dialog(f'{row} [data-action="key-rename"]', ('#field-label', 'better name'))
        self.browser.until('document.querySelector(a[0]).innerText.includes("better name")', row)
        self.dialog(f'{row} [data-action="key-token"]', ('#field-token', token_of('d')))
        self.browser.until('!document.querySelector("dialog[open]")')
        self.assertEqual(self.read_config()['keys']['third']['token'], token_of('d'))
        self.dialog(f'{row} [data-action="key-remove"]')
        self.browser.until('!document.querySelector(a[0])', row)
        self.assertEqual(list(self.read_config()['keys']), ['a', 'b'])
        self.assertNotIn('0123456789',
                         self.browser.run('return document.documentElement.outerHTML'))

    def test_what_is_wrong_is_said_beside_its_field_and_loses_nothing(self):
        self.open('keys')
        self.dialog('#add-key', ('#field-token', openai_token_of('x')), ('#field-label', 'mine'))
        self.browser.until(
            'document.querySelector("#field-token-error").textContent.includes("sk-ant-")')
        self.assertEqual(self.browser.run(
            'const f = document.querySelector("dialog[open] form").elements; return '
            '[f.label.value, f.token.getAttribute("aria-invalid")]'), ['mine', 'true'])
        self.browser.press('Escape')
        self.open('fallback')
        self.browser.fill('#set-queueWaitMs', '-5')
        self.browser.click('#group-waiting [type="submit"]')
        self.browser.until(
            'document.querySelector("#error-queueWaitMs").textContent.includes("0 or more")')
        self.browser.fill('#set-anthropicBaseUrl', 'http://api.example.com')
        self.browser.click('#group-urls [type="submit"]')
        self.browser.until(
            'document.querySelector("#error-anthropicBaseUrl").textContent.includes("must use '
            'https")')
        self.assertEqual(self.app.store.current.queue_wait_ms, 90_000)
        self.expected_errors = 2

    def test_keys_are_put_in_order_by_keyboard_and_by_drag(self):
        self.reload(make_document('a', 'b', 'c', anthropicBaseUrl=self.anthropic.url))
        self.open('keys')
        self.browser.until('document.querySelectorAll("#keys-anthropic tbody tr").length === 3')
        self.browser.run('document.querySelector("[aria-label=\\"Move a down\\"]").focus()')
        self.browser.press('Enter')
        self.browser.until(
            'document.querySelector("#keys-anthropic tbody tr").dataset.id === "anthropic:b"')
        self.assertEqual(self.browser.run(
            'return document.activeElement.closest("tr").dataset.id'), 'anthropic:a')
        self.browser.press('Enter')           # the focus stays on the key that moves
        self.browser.until('document.querySelectorAll("#keys-anthropic tbody tr")[2].dataset.id '
                           '=== "anthropic:a"')
        self.browser.until('!state.orders.size')
        self.assertEqual(self.app.store.current.profiles['default'].order,
                         ('anthropic:b', 'anthropic:c', 'anthropic:a'))
        self.browser.drag('tr[data-id="anthropic:b"] .handle', 'tr[data-id="anthropic:a"]')
        self.browser.until('document.querySelectorAll("#keys-anthropic tbody tr")[2].dataset.id '
                           '=== "anthropic:b" && !state.orders.size')
        self.assertEqual(self.order(), ['anthropic:c', 'anthropic:a', 'anthropic:b'])
        self.assertEqual(self.app.store.current.profiles['default'].order,
                         ('anthropic:c', 'anthropic:a', 'anthropic:b'))

    def test_a_profile_is_made_and_its_port_used(self):
        port = free_port()
        self.open('profiles')
        self.dialog('#add-profile', ('#field-name', 'second'), ('#field-port', str(port)))
        self.shown(f'http://localhost:{port}')
        self.assertEqual(self.send(port=port, host='localhost').headers['x-proxy-key'], 'a')
        self.browser.click('section[data-id="second"] [aria-label="Move b up"]')
        self.browser.until('document.querySelector("section[data-id=second] li").dataset.id === '
                           '"anthropic:b" && !state.orders.size')
        self.assertEqual(self.send(port=port, host='localhost').headers['x-proxy-key'], 'b')
        self.dialog('section[data-id="second"] [data-action="profile-remove"]')
        self.browser.until('!document.querySelector("section[data-id=second]")')
        self.assertEqual(list(self.app.ports()), ['default'])

    def test_a_chain_is_edited_and_an_impossible_one_is_not_saved(self):
        self.open('fallback')
        self.browser.click('[data-setting="modelFallback"] [data-action="step-add"]')
        self.browser.fill('[data-chain="0"] .step:last-of-type input', 'claude-haiku-*')
        self.browser.click('#group-models [type="submit"]')
        self.browser.until('!state.drafts.size')
        self.assertEqual(self.app.store.current.model_fallback,
                         {'claude-opus-*': 'claude-sonnet-*', 'claude-sonnet-*': 'claude-haiku-*'})
        self.browser.click('[data-setting="modelFallback"] [data-action="row-add"]')
        self.browser.fill('[data-chain="1"] .step:first-of-type input', 'claude-opus-*')
        self.browser.fill('[data-chain="1"] .step:last-of-type input', 'gpt')
        self.browser.click('#group-models [type="submit"]')
        self.browser.until(
            'document.querySelector("#error-modelFallback").textContent.includes("it can have '
            'one only")')
        self.assertEqual(len(self.app.store.current.model_fallback), 2)

    def test_the_model_mapping_is_edited_row_by_row(self):
        self.open('fallback')
        self.browser.click('[data-setting="openaiModelMapping"] [aria-label="Remove row 1"]')
        self.browser.click('[data-setting="openaiModelMapping"] [data-action="row-add"]')
        self.assertEqual(self.browser.run(
            'return document.activeElement.getAttribute("aria-label")'), 'Claude model, row 4')
        self.browser.fill('li[data-row="3"] input:first-of-type', 'claude-opus-4*')
        self.browser.fill('li[data-row="3"] input:last-of-type', 'o5')
        self.browser.click('#group-openai [type="submit"]')
        self.browser.until('!state.drafts.size')
        self.assertEqual(self.app.store.current.openai_model_mapping,
                         {'claude-sonnet-*': 'gpt-5.4-mini', 'claude-haiku-*': 'gpt-5.4-nano',
                          '*': 'gpt-5.4', 'claude-opus-4*': 'o5'})

    def test_settings_are_saved_with_their_units_and_a_draft_survives_a_change_elsewhere(self):
        self.open('fallback')
        self.browser.fill('#set-queueWaitMs', '2')
        self.browser.run(
            'const unit = document.querySelector("[name=queueWaitMs-unit]"); unit.value = "min"; '
            'unit.dispatchEvent(new Event("input", {bubbles: true}))')
        self.app.update(lambda config: cf.change_settings(config, {'cooldownMs': 60_000}))
        self.shown('The configuration changed elsewhere', '#group-waiting')
        self.assertEqual(
            self.browser.run('return document.querySelector("#set-queueWaitMs").value'), '2')
        self.browser.click('#group-waiting [type="submit"]')
        self.browser.until('!state.drafts.size')
        self.assertEqual(self.app.store.current.queue_wait_ms, 120_000)

    def test_another_base_url_asks_for_the_tokens_again(self):
        self.open('fallback')
        self.browser.fill('#set-anthropicBaseUrl', 'http://localhost:9')
        self.browser.click('#group-urls [type="submit"]')
        for key in 'ab':
            self.browser.fill(f'dialog[open] [name="anthropic:{key}"]', token_of(key))
        self.browser.click('dialog[open] [type="submit"]')
        self.browser.until('!state.drafts.size && !document.querySelector("dialog[open]")')
        self.assertEqual(self.app.store.current.anthropic_base_url, 'http://localhost:9')
        self.expected_errors = 1

    def test_tools_are_set_up_and_given_back_with_one_click(self):
        zshrc = os.path.join(self.folder, '.zshrc')
        with open(zshrc, 'w') as file:
            file.write('mine\n')
        self.open('setup')
        self.browser.click('li[data-id="zsh"] button')
        self.shown(f'now uses http://localhost:{self.port}', 'li[data-id="zsh"]')
        self.browser.click('li[data-id="zsh"] [aria-label^="Undo"]')
        self.shown('does not use the proxy now', 'li[data-id="zsh"]')
        with open(zshrc) as file:
            self.assertEqual(file.read(), 'mine\n')
        self.shown('Cursor cannot use a proxy')
        self.shown(f'ANTHROPIC_BASE_URL=http://localhost:{self.port}')

    def test_the_log_is_followed_filtered_and_paused(self):
        self.open('logs')
        self.shown('started', '#log-lines')
        self.app.log.warn('something_odd', text='needle in a haystack')
        self.shown('something_odd', '#log-lines')
        self.browser.fill('#log-text', 'NEEDLE')
        self.browser.until('document.querySelectorAll("#log-lines li").length === 1')
        self.browser.click('#log-pause')
        self.app.log.warn('something_else', text='another needle')
        self.shown('1 new', '.panel-head:has(#log-count)')
        self.assertNotIn('something_else', self.browser.text('#log-lines'))
        self.browser.click('#log-pause')
        self.shown('something_else', '#log-lines')
        self.browser.run('const level = document.querySelector("#log-level"); level.value = '
                         '"error"; level.dispatchEvent(new Event("input", {bubbles: true}))')
        self.browser.until('document.querySelectorAll("#log-lines li").length === 0')

    def test_it_lives_through_a_restart_of_the_proxy(self):
        document = {**make_document('a', 'b', anthropicBaseUrl=self.anthropic.url)}
        document['profiles']['default']['port'] = self.port
        self.open()
        self.shown('Serving from a', '#state-sentence')
        self.stop()
        self.browser.until('!document.querySelector("#away").hidden')
        self.assertIn('The proxy is not reachable since', self.browser.text('#away'))
        self.start(document)
        self.browser.until('document.querySelector("#away").hidden')
        self.send()
        self.browser.until('document.querySelectorAll("#requests tbody tr").length === 1')
        self.expected_errors = 30

    def test_a_hostile_label_model_and_message_stay_text(self):
        evil = '<img src=x onerror="document.title=1"><b>evil</b>\x1b[31m' + 'w' * 300
        document = make_document('a', anthropicBaseUrl=self.anthropic.url)
        document['keys']['a']['label'] = evil
        self.reload(document)
        self.send(body=messages_body(model=evil))
        self.app.log.warn('evil', text=evil)
        for page in PAGES:
            self.browser.resize(390, 844)
            self.open(page)
            self.browser.until('document.querySelector("main section:not([hidden])")')
            self.assertEqual(self.browser.run('return document.querySelectorAll("main img, main '
                                              'b:not(.log-lines b, .facts b)").length'), 0)
            self.assertLessEqual(self.browser.run('return document.documentElement.scrollWidth'),
                                 390, page)

    def test_an_access_token_is_asked_for_once(self):
        self.app.update(lambda config: cf.change_settings(config, {'accessToken': 'open-sesame'}))
        self.browser.go(f'http://localhost:{self.port}/dashboard')
        self.browser.fill('dialog[open] #field-token', 'wrong')
        self.browser.click('dialog[open] [type="submit"]')
        self.browser.until(
            'document.querySelector("#field-token-error").textContent.includes("not the access '
            'token")')
        self.browser.fill('dialog[open] #field-token', 'open-sesame')
        self.browser.click('dialog[open] [type="submit"]')
        self.shown('Serving from a', '#state-sentence')
        self.browser.go(f'http://localhost:{self.port}/dashboard')
        self.shown('Serving from a', '#state-sentence')
        self.assertNotIn('sesame', self.browser.run(
            'return document.documentElement.outerHTML + document.cookie'))
        self.expected_errors = 8

    def fill_up(self):
        """20 keys, 200 requests, cooldowns, and a second profile."""
        ids = [f'key-{number}' for number in range(18)]
        document = make_document(*ids, anthropicBaseUrl=self.anthropic.url,
                                 **with_openai('o', 'p'))
        document['profiles']['second'] = {'port': free_port()}
        self.reload(document)
        self.anthropic.fields = cf.pretend_limits(100)
        self.anthropic.limits = lambda body: random.random() < 0.05
        for number in range(200):
            self.send(body=messages_body(model=(OPUS, SONNET, 'claude-haiku-5-5')[number % 3]))

    def test_every_page_fits_wide_and_narrow_and_is_readable_light_and_dark(self):
        for fill in (lambda: None, self.fill_up):
            fill()
            for page in PAGES:
                self.open(page)
                for width in (1440, 390):
                    self.browser.resize(width, 900)
                    for scheme in ('light', 'dark'):
                        self.browser.prefer(scheme)
                        with self.subTest(page=page, width=width, scheme=scheme):
                            self.assertLessEqual(self.browser.run(
                                'return document.documentElement.scrollWidth'), width)
                            self.assertEqual(self.browser.run(CONTRAST_SCRIPT), [])

    def test_every_control_has_a_name_and_is_reached_by_keyboard(self):
        self.anthropic.limited.add('a')
        self.send()
        for page in PAGES:
            self.open(page)
            self.browser.until('document.querySelector("main section:not([hidden]) button, main '
                               'section:not([hidden]) [tabindex]")')
            nameless = self.browser.run('''
                return [...document.querySelectorAll('button, a, input, select')]
                    .filter((e) => e.getClientRects().length && !e.innerText)
                    .filter((e) => !(e.getAttribute('aria-label') || e.labels?.length))
                    .map((e) => e.outerHTML)''')
            self.assertEqual(nameless, [])
            wanted = self.browser.run('''
                return [...document.querySelectorAll('button, a[href], input, select')]
                    .filter((e) => e.getClientRects().length && !e.disabled).length''')
            self.browser.run(
                'document.body.focus(); document.activeElement.blur(); window.reached = new Set();'
                'document.addEventListener("focusin", (event) => '
                'window.reached.add(event.target))')
            self.browser.press(*['Tab'] * (wanted + 5))
            self.assertGreaterEqual(self.browser.run('return window.reached.size'), wanted, page)

    def test_updates_do_not_take_the_focus_nor_what_is_typed(self):
        self.open('fallback')
        self.browser.fill('#set-openaiBaseUrl', 'https://half.typed')
        self.send()
        self.browser.until('state.status.metrics.requests === 1')
        self.app.update(lambda config: cf.change_settings(config, {'queueWaitMs': 1000}))
        self.browser.until('state.config.settings.queueWaitMs === 1000')
        self.browser.press('x')
        self.assertEqual(
            self.browser.run('return [document.activeElement.id, document.activeElement.value]'),
            ['set-openaiBaseUrl', 'https://half.typedx'])

    def test_back_and_reload_keep_the_page(self):
        self.open()
        self.browser.click('#nav-keys')
        self.browser.click('#nav-logs')
        self.browser.run('history.back()')
        self.browser.until('location.pathname === "/dashboard/keys" && '
                           '!document.querySelector("[data-page=keys].page").hidden')
        self.open('keys')
        self.assertEqual(self.browser.run(
            'return document.querySelector("#nav [aria-current]").id'), 'nav-keys')

    def test_it_loads_with_one_request_and_the_policy_is_in_force(self):
        self.browser.logged('performance')
        self.open()
        sent = [json.loads(line['message'])['message']
                for line in self.browser.logged('performance')]
        urls = [message['params']['request']['url'] for message in sent
                if message['method'] == 'Network.requestWillBeSent']
        self.assertEqual([url.rpartition(str(self.port))[2] for url in urls
                          if not url.startswith('data:')], ['/dashboard/status', '/api/events'])
        outcome = self.browser.run(
            "const s = document.createElement('script'); s.textContent = 'window.broken = 1'; "
            "document.body.append(s); return window.broken || 'blocked'")
        self.assertEqual(outcome, 'blocked')
        self.browser.logged('browser')        # which says so


# ==============================================================================
# Real clients
# ==============================================================================

PYTHON_CLIENT = '''
import json, os, anthropic
client = anthropic.Anthropic(
    base_url=os.environ['BASE_URL'], api_key='sk-ant-api03-mine', max_retries=0)
question = dict(model='%s', max_tokens=50, messages=[{'role': 'user', 'content': 'hi'}])
plain = client.messages.create(**question)
with client.messages.stream(**question) as stream:
    streamed = stream.get_final_message()
count = client.messages.count_tokens(model=question['model'], messages=question['messages'])
print(json.dumps([plain.content[0].text, plain._request_id, streamed.content[0].text,
                  streamed.usage.output_tokens, count.input_tokens,
                  [model.id for model in client.models.list()]]))
''' % OPUS

NODE_CLIENT = '''
import Anthropic from '%s/index.mjs';
const client = new Anthropic({
    baseURL: process.env.BASE_URL, apiKey: 'sk-ant-api03-mine', maxRetries: 0 });
const messages = [{ role: 'user', content: 'hi' }];
const question = { model: '%s', max_tokens: 50, messages };
const plain = await client.messages.create(question);
const streamed = await client.messages.stream(question).finalMessage();
const count = await client.messages.countTokens({ model: question.model, messages });
const models = [];
for await (const model of client.models.list()) models.push(model.id);
console.log(JSON.stringify([plain.content[0].text, plain._request_id, streamed.content[0].text,
                            streamed.usage.output_tokens, count.input_tokens, models]));
''' % (NODE_SDK, OPUS)


#: Claude Code calls nobody but the API then.
QUIET_CLAUDE = {'DISABLE_AUTOUPDATER': '1', 'DISABLE_TELEMETRY': '1',
                'DISABLE_ERROR_REPORTING': '1', 'CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC': '1'}


class RealClientsTest(ProgramTest):
    """Claude Code and the official SDKs, through the proxy, with the first key at its limit."""

    def setUp(self):
        super().setUp()
        self.anthropic.limited.add('a')

    def run_client(self, command, stdin='', **environ):
        base = {'PATH': os.environ['PATH'], 'HOME': self.folder,
                'BASE_URL': f'http://localhost:{self.port}',
                'LANG': 'C.UTF-8', 'NO_PROXY': '127.0.0.1,localhost'}
        done = subprocess.run(command, input=stdin, capture_output=True, text=True,
                              cwd=self.folder, env={**base, **environ}, timeout=120)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        return done.stdout

    def check_sdk(self, printed):
        self.assertEqual(json.loads(printed), ['hello', 'req_upstream', 'hello', 5, 42, [OPUS]])
        self.assertEqual({key for key, *_ in self.anthropic.seen}, {'a', 'b'})

    @needs(SDK_PYTHON)
    def test_the_official_python_sdk_streams_and_not(self):
        self.check_sdk(self.run_client([SDK_PYTHON, '-c', PYTHON_CLIENT]))

    @needs(NODE_SDK)
    def test_the_official_node_sdk_streams_and_not(self):
        self.check_sdk(self.run_client(['node', '--input-type=module'], NODE_CLIENT))

    def run_claude_code(self, *names):
        """Has Claude Code write some files, and looks whether it did."""
        paths = [os.path.join(self.folder, name) for name in names]
        printed = self.run_client([CLAUDE, '-p', ' and '.join(f'write {path}' for path in paths),
                                   '--output-format', 'json', '--allowedTools', 'Write'],
                                  ANTHROPIC_BASE_URL=f'http://localhost:{self.port}',
                                  ANTHROPIC_AUTH_TOKEN='any', **QUIET_CLAUDE)
        result = json.loads(printed)
        self.assertEqual((result['is_error'], result['result']), (False, 'Done: file written.'))
        for path in paths:
            with open(path) as file:
                self.assertEqual(file.read(), 'written through the proxy\n')
        return result

    def add_openai(self, **changes):
        """Adds a pretend OpenAI as the last resort."""
        self.openai = PretendOpenAI(self)
        self.reload(make_document(*self.KEYS, anthropicBaseUrl=self.anthropic.url, queueWaitMs=0,
                                  **with_openai('oa', openaiBaseUrl=self.openai.url, **changes)))

    @needs(CLAUDE)
    def test_claude_code_finishes_its_task_on_openai_when_every_claude_key_is_limited(self):
        self.anthropic.limited = {'a', 'b'}
        for changes, path in (({}, '/v1/chat/completions'),
                              ({'openaiApi': 'responses'}, '/v1/responses')):
            self.add_openai(**changes)
            result = self.run_claude_code(f'{len(path)}.txt')
            self.assertEqual({path for _, _, path, _ in self.openai.seen}, {path})
            self.assertEqual(result['usage']['cache_read_input_tokens'],
                             20 * len(self.openai.seen))
            os.unlink(os.path.join(self.folder, f'{len(path)}.txt'))

    @needs(CLAUDE)
    def test_a_conversation_goes_from_claude_to_openai_and_back(self):
        self.add_openai(openaiApi='responses')
        self.anthropic.limited = set()
        self.anthropic.limits = lambda body: json.dumps(body['messages']).count(
            '"tool_result"') == 1
        self.openai.answered = self.app.cooldowns.clear
        self.run_claude_code('one.txt', 'two.txt')
        self.assertEqual(len(self.openai.seen), 1)
        answered = [body for key, method, path, body in self.anthropic.seen
                    if not self.anthropic.limits(body)]
        self.assertEqual(len(answered), 2)
        history = json.dumps(answered[-1]['messages'])
        self.assertIn('"call_1"', history)            # OpenAI's call is in what Claude sees
        self.assertNotIn('gAAAsealed', history)       # its sealed reasoning is not

    @needs(CLAUDE)
    def test_claude_code_works_after_add_key_setup_and_start_and_gets_its_files_back(self):
        def run(*command, **environ):
            done = run_process(*command, stdin=token_of('b'), **environ)
            self.assertEqual(done.returncode, 0, done.stderr)
            return done.stdout
        self.path = os.path.join(self.folder, '.config', 'claude-failover', 'config.json')
        self.write_config({'anthropicBaseUrl': self.anthropic.url,
                           'profiles': {'default': {'port': free_port()}}})
        settings, task = (os.path.join(self.folder, '.claude', 'settings.json'),
                          os.path.join(self.folder, 'task.txt'))
        os.mkdir(os.path.dirname(settings))
        before = '{\n  "cleanupPeriodDays": 20\n}\n'
        with open(settings, 'w') as file:
            file.write(before)
        run('add-key', '-')
        run('setup', '--only', 'claude-code')
        run('start', '-d')
        self.addCleanup(run, 'stop', '--now')
        printed = self.run_client([CLAUDE, '-p', f'write {task}', '--output-format', 'json',
                                   '--allowedTools', 'Write'], **QUIET_CLAUDE)
        self.assertEqual(json.loads(printed)['result'], 'Done: file written.')
        self.assertTrue(os.path.exists(task))
        run('setup', '--undo')
        with open(settings) as file:
            self.assertEqual(file.read(), before)

    @needs(CLAUDE)
    def test_claude_code_finishes_a_task_that_uses_tools(self):
        self.run_claude_code('written.txt')
        self.assertIn('a', {key for key, *_ in self.anthropic.seen})
        self.assertNotIn('any', {key for key, *_ in self.anthropic.seen})


if __name__ == '__main__':
    unittest.main()
