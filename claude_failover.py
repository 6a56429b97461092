#!/usr/bin/env python3
"""claude-failover: a local proxy that keeps Claude Code and other Anthropic clients answered.

When a key is rate-limited the next key answers; when every key cools for a model, a
fallback model answers; when a key is about to come back, the request waits for it; when
Claude is exhausted, an OpenAI model answers, translated both ways.

One request, from top to bottom of its path (and from bottom to top of this file):

    Handler             reads the head strictly, guards Host and Origin, matches ROUTES
    forward             makes a ClientRequest and an Exchange (both ends of one request)
    Serving.serve       one round after another, until one is answered; in each:
      plan_attempts     [Attempt(key, model), ...] in the profile's order, OpenAI's last
      order_attempts    where the conversation's cache is (Conversations), or by the strategy
      Cooldowns.admit   passes over what cools; what has just come back is tried in line
      find_target       where it goes, and how: to OpenAI in its own words (read_conversation)
      Upstream.open     sends one attempt; an UpstreamResponse or UpstreamUnreachable
      AnswerReader      reads an answer as far as it takes to know what it means
      classify          the Outcome: one row of RULES or OPENAI_RULES
      relay             the commit: after its first byte there is no failover any more
      StreamCarrier     passes on the events of all streams; OpenAI's by a TranslatedStream
    final_failure       what the client gets when nothing is left
    Journal.finished    one log line, the counters, the recent requests

Words: a *key* is one credential; a *profile* is an order of keys with its own port; an
*attempt* is one key tried with one model, the *plan* is the attempts in order; a key or a
key and model *cools* until a time; to *rotate* is to go to the next key, to *fall back* to
the next model, to *queue* to hold the request; *exhausted* is when nothing is left.

Sections, each using only what stands above it (grep -A1 '^# ====' prints them):

    Constants               limits, paths and header names, each with its reason
    Small tools             errors that know their HTTP status, masking, durations, safe files
    Configuration           SETTINGS, Key, Profile, Config: parsed once, never changed
    Configuration edits     Config -> Config: what commands do to it
    Planning                which key with which model, in which order
    Request bodies          the model in a body, and thinking that Anthropic did not sign
    Targets                 where a key's requests go, and with which head
    Repairs                 what a refused request becomes
    Classification          RULES: what every upstream answer means
    Event streams           whole server-sent events, and what is read from them
    Request translation     a Messages request in OpenAI's two wire formats
    Response translation    OpenAI's answers as Anthropic's: MessageEvents owns the grammar
    Cooldowns               what cools until when, and the queue of those who wait
    Conversations           where each one's prompt cache is, and how busy each key is
    Journal                 the log file, the counters, the recent requests
    Configuration store     the file: atomic, private, reloaded when it changes
    Secrets                 the tokens that file:PATH and env:NAME stand for
    State                   what a restart does not lose
    Exchanges               both ends of a request, and the watcher that sees either end leave
    HTTP messages           heads and chunked bodies as both sides read them
    Client connections      request heads and bodies read strictly, answers written once
    Upstream                connections that are reused, answers that are read strictly
    Compressed answers      what came compressed, as it is read
    Carrying streams        one thread that passes on the events of all streams
    Answers                 one answer: read until its meaning is known, then relayed
    Failures                what a client gets when nothing is left to try
    Serving                 one request from its plan to its answer
    Autostart               the files by which launchd or systemd starts it at login
    Tool setup              how Claude Code and shells come to use the proxy, and undo
    API                     what the dashboard and scripts ask for
    HTTP server             the guard, ROUTES, a listener for each profile
    Service                 the App: puts the parts together, reloads, stops
    Doctor                  what is wrong with a proxy and its surroundings
    Demo                    the proxy between a client and made-up upstreams
    Command line            COMMANDS: printing happens only here
    Main

From Configuration to Response translation nothing knows a clock, file, socket or thread:
values in, values out.
Tests: python3 test_claude_failover.py
"""
from __future__ import annotations

import base64
import collections
import contextlib
import copy
import email.utils
import enum
import errno
import functools
import hashlib
import hmac
import http.client
import http.server
import itertools
import json
import math
import operator
import os
import queue
import random
import re
import select
import selectors
import socket
import socketserver
import stat
import struct
import sys
import threading
import time
import urllib.parse
import zlib
from datetime import datetime, timezone
from typing import Any, Callable, Iterator, NamedTuple, Sequence

try:
    import fcntl
except ImportError:        # Windows: no advisory locks; edits there rely on the re-check alone
    fcntl = None


# ==============================================================================
# Constants
# ==============================================================================

VERSION = '1.0.0'
PROGRAM = 'claude-failover'
#: How this file is run, for messages that say what to do next.
SCRIPT_NAME = os.path.basename(__file__)
RUN = 'python3 ' + (sys.argv[0] if os.path.basename(sys.argv[0]) == SCRIPT_NAME else SCRIPT_NAME)

#: Where the Node program of the same name keeps it, so that its users lose nothing.
DEFAULT_CONFIG_PATH = '~/.config/claude-failover/config.json'
DEFAULT_PORT = 4080
LISTEN_HOST = '127.0.0.1'

#: Most request bytes we hold.  The Messages API itself refuses more than 32 MB.
MAX_BODY_BYTES = 32 * 1024 * 1024
#: A head: Claude Code's is 1 KB; nginx takes 32 KB, http.client 100 fields.
MAX_HEAD_BYTES = 64 * 1024
MAX_LINE_BYTES = 16 * 1024
MAX_FIELDS = 100
#: Most of an error body that is read and passed on; Anthropic's have some 200 bytes.
MAX_ERROR_BODY_BYTES = 4 * 1024 * 1024
#: An error's message, as far as it is read; the longest of Anthropic's have some 500.
MAX_MESSAGE_CHARS = 2000
#: An event longer than this is passed on in parts; the longest real one is a tool's input.
MAX_EVENT_BYTES = 4 * 1024 * 1024
#: What one receive asks for.
RECEIVE_BYTES = 64 * 1024
#: Of a plain answer's beginning, so that one that is none is seen before it is the client's.
HELD_BYTES = 64 * 1024
#: Each connection is a thread with two sockets; a client that opens more is out of control.
MAX_CONNECTIONS = 2000

#: Waiting for an upstream: the connection, the whole head of a plain answer and of a stream,
#: whose first byte is what takes long (thinking is silent), and between two events.
CONNECT_S = 10
FIRST_BYTE_S = 600
STREAM_IDLE_S = 300
#: Waiting for the end of a body whose last event has come.
LAST_CHUNK_S = 0.2
#: Older idle connections are not trusted: a laptop that slept, a NAT that forgot, look alike.
POOL_IDLE_S = 30
#: How often the configuration file is looked at.
RELOAD_S = 5
#: How long running requests may go on after the first signal.
DRAIN_S = 10
#: The variable that tells a proxy who started it: 'launchd', 'systemd', or nobody.
STARTED_BY = 'CLAUDE_FAILOVER_STARTED_BY'
#: How often a program looks whether another, or a running answer, has ended.
POLL_S = 0.02

#: A held stream gets its head and a ping after this long; Claude Code warns after 20 s.
PING_S = 10
#: SDKs obey retry-after up to this; beyond it `x-should-retry: false` stops them at once.
CLIENT_PATIENCE_S = 60
#: Different repairs of one request for one model.
MAX_REPAIRS = 6
#: Cooldowns that are remembered: far more than keys times models, but not without end.
MAX_COOLDOWNS = 10_000
#: Plans that are kept: clients may name any number of models.
MAX_PLANS = 256
#: Attempts that x-proxy-attempts lists.
MAX_TOLD_ATTEMPTS = 30
#: A shorter credential is a word (`none`, `x`), which a text may hold without quoting it.
MIN_SECRET_CHARS = 8

HOP_BY_HOP = frozenset((
    'connection', 'keep-alive', 'proxy-authenticate', 'proxy-authorization', 'proxy-connection',
    'te', 'trailer', 'transfer-encoding', 'upgrade'))

MESSAGES_PATH = '/v1/messages'
COUNT_TOKENS_PATH = '/v1/messages/count_tokens'
MODELS_PATH = '/v1/models'


# ==============================================================================
# Small tools
# ==============================================================================

class FailoverError(Exception):
    """An error that knows its answer: `status`, `type` and `details` in Anthropic's shape (their
    `field` is what was wrong in a body), on the command line its text and `exit_status`.  The
    text may quote what a user typed: tokens in it are masked."""
    status, type, exit_status = 500, 'api_error', 1
    fields: Any = ()          # more header fields of the answer

    def __init__(self, message: str, **details):
        super().__init__(redact(message))
        self.details = details


class ConfigError(FailoverError):
    """A wrong value, from the configuration file or from an edit; names field and remedy."""
    status, type, exit_status = 400, 'invalid_request_error', 2


class UnknownKey(ConfigError):
    status, type = 404, 'not_found_error'

    def __init__(self, key_id: str):
        super().__init__(f'There is no key {printable(key_id)!r}. See: {RUN} list-keys')


class UsageError(FailoverError):
    """A command that cannot be carried out as it was given."""
    status, type, exit_status = 400, 'invalid_request_error', 2


class BadRequest(FailoverError):
    """A client's request that is refused before it is planned."""
    def __init__(self, message: str, status=400, type='invalid_request_error', fields: Any = (),
                 **details):
        super().__init__(message, **details)
        self.status, self.type, self.fields = status, type, fields


class Forbidden(FailoverError):
    """A request that may come from a foreign web page."""
    status, type = 403, 'permission_error'


class NotSaved(FailoverError):
    """A configuration that could not be written: the disk is full or read-only."""
    status = 507


class ClientGone(Exception):
    """The client left; nobody hears an answer."""


class UpstreamTimeout(Exception):
    """No answer, or no further event, in time."""


class UpstreamCut(Exception):
    """The upstream's answer ended before it was complete."""


class NothingYet(Exception):
    """A socket that does not block has nothing to read now."""


class UpstreamClosed(UpstreamCut):
    """An orderly close, which ends a body that has no other end."""


class UpstreamUnreachable(Exception):
    """No byte of an answer came.  `connected` tells a reset from a connection never made."""
    def __init__(self, reason: str, connected: bool):
        super().__init__(reason)
        self.reason, self.connected = reason, connected


def error_json(type: str, message: str, **details) -> bytes:
    """An error in Anthropic's shape, as bytes."""
    error = {'type': 'error', 'error': {'type': type, 'message': message, **details}}
    return json.dumps(error).encode()


def error_reason(error: BaseException) -> str:
    """Why a connection failed, by the system's own words and class names: http.client's messages
    can quote a header value that was sent."""
    if isinstance(error, socket.gaierror):
        return 'name resolution failed'
    if verify_message := getattr(error, 'verify_message', None):      # ssl's
        return f'certificate not accepted: {verify_message} (SSL_CERT_FILE names a CA file)'
    if isinstance(error, (TimeoutError, socket.timeout)):     # one class since Python 3.10
        return 'timed out'
    return getattr(error, 'strerror', None) or type(error).__name__


def where_raised(error: BaseException | None) -> str:
    """'proxy:1234 < _serve_one:1200': functions and lines of a traceback, without any value."""
    frames, step = [], error and error.__traceback__
    while step:
        frames.append(f'{step.tb_frame.f_code.co_name}:{step.tb_lineno}')
        step = step.tb_next
    return ' < '.join(reversed(frames))


def is_reference(token: str) -> bool:
    """Whether a token only names where the secret is: `env:NAME`, `file:PATH`."""
    return token.startswith(('env:', 'file:'))


def mask_token(token: str) -> str:
    """A token as shown: its kind, a long one's last four characters; references whole."""
    if is_reference(token):
        return printable(token)
    kind = re.match(r'sk-ant-[a-z]{1,5}|sk-proj|sk|eyJ', token)
    end = token[-4:] if len(token) >= 40 else ''
    return printable(f'{kind.group() if kind else ""}...{end}')


def is_jwt(token: str) -> bool:
    """Whether a token is a JSON Web Token: a login, not an API key."""
    return token.startswith('eyJ') and token.count('.') == 2


def is_same_secret(given: str, secret: str) -> bool:
    """Whether two texts are the same, in constant time; JSON may hold what UTF-8 cannot."""
    return hmac.compare_digest(given.encode('utf-8', 'surrogatepass'),
                               secret.encode('utf-8', 'surrogatepass'))


def jwt_claims(token: str) -> dict:
    """The claims of a JSON Web Token (RFC 7519), unverified; {} when it is unreadable."""
    try:
        part = token.split('.')[1]
        return loads_object(base64.urlsafe_b64decode(part + '=' * (-len(part) % 4)))
    except (ValueError, IndexError):
        return {}


#: OpenAI's, Anthropic's, OpenRouter's, DeepSeek's (sk-), logins, Groq's, xAI's and others.
SECRET = re.compile(r'(?:sk-(?:ant|proj)-|(?<![a-z]{2})sk-)[A-Za-z0-9_-]{8,}'   # no desk-lamps
                    r'|(?:gsk_|xai-|hf_|pplx-|nvapi-|AIza)[A-Za-z0-9_-]{16,}'
                    r'|eyJ[A-Za-z0-9_-]{8,}(\.[A-Za-z0-9_-]+)*')
#: One of these is in every match of SECRET: a text without them need not be searched.
SECRET_MARKS = ('sk-', 'gsk_', 'xai-', 'hf_', 'pplx-', 'nvapi-', 'AIza', 'eyJ')


def redact(text: str) -> str:
    """A text with all that looks like a token masked."""
    if not any(map(text.__contains__, SECRET_MARKS)):
        return text
    return SECRET.sub(lambda match: mask_token(match.group()), text)


def printable(text: object) -> str:
    """Text without control characters, so that it cannot steer a terminal or split a line."""
    return ''.join(c if c.isprintable() else ' ' if c in '\t\r\n' else
                   '\N{REPLACEMENT CHARACTER}' for c in str(text))


@functools.lru_cache(maxsize=256)     # models' names
def header_text(text: object) -> str:
    """Text as one header value: visible ASCII and spaces, at most 600 of them."""
    return re.sub(r'[^ -~]', '?', str(text)[:600])


def format_duration(seconds: float) -> str:
    """Seconds as a person says them: '45 s', '12 min', '3 h 5 min', '2 d 4 h'."""
    seconds = max(0, round(seconds))
    if seconds < 100:
        return f'{seconds} s'
    minutes = round(seconds / 60)
    if minutes < 100:
        return f'{minutes} min'
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f'{hours} h {minutes} min' if minutes else f'{hours} h'
    days, hours = divmod(hours, 24)
    return f'{days} d {hours} h' if hours else f'{days} d'


def count_of(number: int, noun: str) -> str:
    """'1 answer', '2 answers'."""
    return f'{number} {noun}' if number == 1 else f'{number} {noun}s'


def local_url(port: int) -> str:
    return f'http://localhost:{port}'


def tilde(path: str) -> str:
    """A path as it is written with ~ for the home folder."""
    home = os.path.expanduser('~')
    return '~' + path[len(home):] if path.startswith(home + os.sep) else path


def utc_text(unix_s: float) -> str:
    """A unix time as '2026-03-01T12:00:00.123Z'."""
    moment = datetime.fromtimestamp(unix_s, timezone.utc)
    return moment.replace(tzinfo=None).isoformat(timespec='milliseconds') + 'Z'


@functools.lru_cache(maxsize=4)       # many answers leave in one second
def http_date(unix_s: int) -> str:
    """A unix time as RFC 9110 section 5.6.7 has it: 'Sun, 01 Mar 2026 12:00:00 GMT'."""
    return email.utils.formatdate(unix_s, usegmt=True)


def loads_object(data: str | bytes | bytearray) -> dict:
    """The JSON object in `data`.  Raises ValueError for anything else."""
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise ValueError('nested too deeply') from error
    if not isinstance(value, dict):
        raise ValueError(f'not a JSON object but {type(value).__name__}')
    return value


def object_or_none(data: str | bytes | bytearray) -> dict | None:
    """The JSON object in `data`; None for anything else."""
    try:
        return loads_object(data)
    except ValueError:
        return None


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def as_dict(value: object) -> dict:
    """Foreign JSON where an object should be: {} when it is none."""
    return value if isinstance(value, dict) else {}


def as_list(value: object) -> list:
    return value if isinstance(value, list) else []


def text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def dump_body(body: object) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False, separators=(',', ':')).encode()
    except UnicodeEncodeError:        # half an emoji: only an escape can carry it
        return json.dumps(body, separators=(',', ':')).encode()


def remember(record: dict, name: Any, value: Any, most: int) -> None:
    """Sets an entry of a record that keeps so many, those that were set last."""
    record.pop(name, None)
    record[name] = value
    for oldest in list(record)[:len(record) - most] if len(record) > most else ():
        record.pop(oldest, None)


def make_private_folder(folder: str) -> None:
    os.makedirs(folder, mode=0o700, exist_ok=True)


def make_private(target: str | int) -> int | None:
    """Closes a folder or file (its path or descriptor) to other users; its mode before, None
    where that was private already.  Raises OSError."""
    found = os.stat(target).st_mode
    is_ours = stat.S_ISREG(found) or stat.S_ISDIR(found)      # not /dev/null, by a link to it
    if not (is_ours and found & 0o077 and os.name != 'nt'):   # Windows has no such modes
        return None
    os.chmod(target, found & 0o700)
    return stat.S_IMODE(found)


def write_atomically(path: str, data: bytes, mode: int = 0o600) -> None:
    """Replaces the file by `data`, whole or not at all.  The temporary file is beside the real
    one: a symbolic link stays one, and the rename stays within one file system."""
    path = os.path.realpath(path)
    temporary = f'{path}.{os.getpid()}.{threading.get_ident()}.tmp'
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, 'wb') as file:
            if mode != 0o600:
                os.chmod(temporary, mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextlib.contextmanager
def folder_locked(path: str) -> Iterator[None]:
    """Locks the folder of a file against other processes of this program."""
    folder = os.path.dirname(os.path.realpath(path))
    try:
        make_private_folder(folder)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise FailoverError(f'{folder} cannot be used ({error.strerror}).') from error
    try:
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)          # and with it the lock goes


def remove_leftovers(path: str) -> None:
    """Removes this file's temporary files, left by processes that were killed while they saved
    it; one that saves it now holds the lock."""
    folder, name = os.path.split(os.path.realpath(path))
    temporary = re.compile(re.escape(name) + r'\.[0-9]+\.[0-9]+\.tmp')
    with folder_locked(path):
        for found in filter(temporary.fullmatch, os.listdir(folder)):
            with contextlib.suppress(OSError):    # a folder, or a read-only place
                os.unlink(os.path.join(folder, found))


# ==============================================================================
# Configuration
# ==============================================================================
# The JSON document is the truth; a Config is a checked, unchanging view of it.  What this
# version does not know stays in the document, so a save cannot lose it.
#
# Values are NamedTuples: as frozen as a dataclass, and at start-up 15 ms cheaper.

#: Objects and lists within one another in the configuration: some five have a use.
MAX_NESTING = 50
NAME = re.compile(r'[A-Za-z0-9._-]{1,64}')
TOKEN = re.compile(r'[!-~]+')
LONE_SURROGATE = re.compile('[\ud800-\udfff]')     # JSON's \u can write it, UTF-8 cannot
ANTHROPIC, OPENAI = 'anthropic', 'openai'
CLIENT_REF = 'client'
#: Wire formats: Anthropic's, and OpenAI's two.
MESSAGES, CHAT_COMPLETIONS, RESPONSES = 'messages', 'chat_completions', 'responses'


class Key(NamedTuple):
    """One credential.  `token` is the secret, or where it is read: env:NAME or file:PATH."""
    ref: str                  # 'anthropic:work': what priorityOrder calls it, and what cools
    id: str
    provider: str
    token: str
    label: str
    oauth: bool = False
    base_url: str | None = None
    api: str | None = None    # of an OpenAI key: its wire format, instead of openaiApi
    model_mapping: dict = {}  # of an OpenAI key: asked before the profile's and the general one
    added_at: str | None = None

    def __repr__(self):       # a traceback must not show the token
        return f'Key({self.ref})'


class Profile(NamedTuple):
    """A named order of keys with its own port."""
    name: str
    port: int
    order: tuple              # ('anthropic:work', 'client', 'openai:backup', ...)
    model_mapping: dict = {}  # asked before the general openaiModelMapping
    strategy: str = 'order'   # by which new conversations are given to keys


class Config(NamedTuple):
    """One checked configuration; a request keeps the one that it began with."""
    document: dict            # as read, with unknown fields; never changed in place
    profiles: dict            # name -> Profile
    keys: dict                # ref -> Key, of both providers
    has_other_providers: bool # answers may come from others than Anthropic itself
    model_fallback: dict
    openai_model_fallback: bool
    openai_model_mapping: dict
    openai_api: str
    anthropic_base_url: str
    openai_base_url: str
    codex_base_url: str
    cooldown_ms: int
    queue_wait_ms: int
    sticky_ms: int | None
    sticky_wait_ms: int
    fallback_patience_ms: int
    first_byte_ms: int | None
    access_token: str | None
    allowed_hosts: list
    allowed_origins: list
    log_level: str
    max_log_size: int

    def __repr__(self):
        return f'Config({len(self.profiles)} profiles, {len(self.keys)} keys)'


#: Answers None for a right value, else what it must be.
Check = Callable[[Any], 'str | None']


class Setting(NamedTuple):
    """One top-level field."""
    name: str
    default: Any
    unit: str
    check: Check
    help: str


def must(be: str, holds: Callable[[Any], bool]) -> Check:
    """The Check of a condition."""
    return lambda value: None if holds(value) else f'must be {be}'


def whole_number(least: int, unit: str) -> Check:
    return must(f'a whole number of {unit}, {least} or more',
                lambda value: is_whole(value) and value >= least)


def one_of(*choices):
    return must('one of ' + ', '.join(choices), choices.__contains__)


check_switch = must('true or false', lambda value: isinstance(value, bool))
check_text = must('a text', lambda value: isinstance(value, str))
check_texts = must('a list of texts', lambda value: isinstance(value, list) and all(
    isinstance(text, str) and text for text in value))
check_access_token = must(
    'a text of visible ASCII characters, or be left out',
    lambda value: isinstance(value, str) and TOKEN.fullmatch(value) is not None)


def check_model_map(value):
    if not isinstance(value, dict) or check_texts(list(value.values())):
        return 'must be an object of model names, like {"claude-opus-*": "claude-sonnet-*"}'
    if any('*' in name[:-1] for name in value):
        return 'may have * only at the end of a name'


def is_near(host):
    """Whether a host is this machine or on a private network, where plain http is usual."""
    if not set('.:').intersection(host.strip('.')) or host.endswith(
            ('.local', '.internal', '.lan', '.localhost')):
        return True
    import ipaddress
    try:
        return ipaddress.ip_address(host).is_private      # loopback and link-local too
    except ValueError:
        return False


def check_base_url(value: Any) -> str | None:
    wanted = 'must be a URL like https://api.example.com or http://localhost:8000/v1'
    if not isinstance(value, str) or not TOKEN.fullmatch(value):
        return wanted
    try:
        url = urllib.parse.urlsplit(value)
        host, _ = url.hostname, url.port
    except ValueError:
        return wanted
    if url.scheme not in ('http', 'https') or not host or url.fragment:
        return wanted
    if url.username is not None or url.password is not None:
        return 'must not hold a user name or password'
    if url.scheme == 'http' and not is_near(host):
        return f'must use https: {printable(host)} is not on this machine or a private network'


SETTINGS = (
    Setting('modelFallback', {'claude-opus-*': 'claude-sonnet-*'}, 'model -> model',
            check_model_map, 'the model that answers when every key cools for another'),
    Setting('openaiModelFallback', False, 'true or false', check_switch,
            'whether OpenAI keys may answer for Claude'),
    Setting('openaiModelMapping',
            {'claude-opus-*': 'gpt-5.4', 'claude-sonnet-*': 'gpt-5.4-mini',
             'claude-haiku-*': 'gpt-5.4-nano', '*': 'gpt-5.4'}, 'model -> model',
            check_model_map, 'the OpenAI model for each Claude model'),
    Setting('openaiApi', CHAT_COMPLETIONS, '', one_of(CHAT_COMPLETIONS, RESPONSES),
            'the wire format for OpenAI keys'),
    Setting('anthropicBaseUrl', 'https://api.anthropic.com', 'URL', check_base_url,
            'where Anthropic keys are used'),
    Setting('openaiBaseUrl', 'https://api.openai.com', 'URL', check_base_url,
            'where OpenAI keys are used'),
    Setting('codexBaseUrl', 'https://chatgpt.com/backend-api/codex', 'URL', check_base_url,
            'where ChatGPT logins are used'),
    Setting('cooldownMs', 3_600_000, 'ms', whole_number(0, 'milliseconds'),
            'the longest that any limit cools a key before it is simply tried again'),
    Setting('queueWaitMs', 90_000, 'ms', whole_number(0, 'milliseconds'),
            'how long a request may wait for a key to come back; 0 switches the queue off'),
    Setting('stickyMs', None, 'ms', whole_number(0, 'milliseconds'),
            'how long a conversation stays with the key that served it; 0: strict order'),
    Setting('stickyWaitMs', 5000, 'ms', whole_number(0, 'milliseconds'),
            'how long a conversation waits for its own key rather than move'),
    Setting('fallbackPatienceMs', 5000, 'ms', whole_number(0, 'milliseconds'),
            'how long a model is waited for before a lower one answers'),
    Setting('firstByteMs', None, 'ms', whole_number(1000, 'milliseconds'),
            'how long a stream may take to its first content'),
    Setting('accessToken', None, 'text', check_access_token,
            'what clients must present as x-api-key or Bearer'),
    Setting('allowedHosts', [], 'list', check_texts,
            'names beside localhost that clients may use for this proxy'),
    Setting('allowedOrigins', [], 'list', check_texts,
            'web origins beside our own that may send requests'),
    Setting('logLevel', 'info', '', one_of('debug', 'info', 'warn', 'error'),
            'the least that is logged'),
    Setting('maxLogSize', 5_242_880, 'bytes', whole_number(4096, 'bytes'),
            'the log file is rotated at this size'),
)

#: Where the two providers' keys and orders stand in the document.
KEY_FIELDS = {ANTHROPIC: 'keys', OPENAI: 'openaiKeys'}
ORDER_FIELDS = {ANTHROPIC: 'keyOrder', OPENAI: 'openaiKeyOrder'}

#: A key's optional fields.  Its type is the Node program's word: only OAuth's two matter.
KEY_FIELD_CHECKS = {
    'type': one_of('api-key', 'oauth', 'api_key', 'oauth_token'), 'label': check_text,
    'baseUrl': check_base_url, 'modelMapping': check_model_map,
    'api': one_of(CHAT_COMPLETIONS, RESPONSES)}
KNOWN_FIELDS = {
    'profiles': ('port', *ORDER_FIELDS.values(), 'priorityOrder', 'openaiModelMapping',
                 'strategy'),
    **dict.fromkeys(KEY_FIELDS.values(), ('token', 'addedAt', *KEY_FIELD_CHECKS))}
STRATEGIES = ('order', 'spread', 'drain')


def unknown_fields(config: Config) -> list:
    """['queueWaitMS', 'profiles.work.keyorder', ...]: kept, but perhaps misspelt."""
    known = {*KNOWN_FIELDS, *(setting.name for setting in SETTINGS)}
    return [name for name in config.document if name not in known] + [
        f'{field}.{name}.{own}' for field, known_here in KNOWN_FIELDS.items()
        for name, entry in object_field(config.document, field).items()
        for own in entry if own not in known_here]


def attribute_name(setting_name: str) -> str:
    """'queueWaitMs' -> 'queue_wait_ms'."""
    return re.sub('[A-Z]', lambda m: '_' + m.group().lower(), setting_name)


def parse_config(document: Any) -> Config:
    """The Config in a JSON document.  Raises ConfigError naming the field and the remedy."""
    if not isinstance(document, dict):
        raise ConfigError('The configuration must be a JSON object: { ... }.')
    texts = list(texts_in(document))
    keys = {}
    for provider, field in KEY_FIELDS.items():
        for id, entry in object_field(document, field).items():
            key = parse_key(provider, f'{field}.{printable(id)}', id, entry)
            keys[key.ref] = key
    entries = object_field(document, 'profiles') or {'default': {'port': DEFAULT_PORT}}
    profiles = {name: parse_profile(name, entry, keys) for name, entry in entries.items()}
    refuse_shared_ports(profiles)
    values = {attribute_name(s.name): setting_value(document, s) for s in SETTINGS}
    for path in (path for path, text in texts if LONE_SURROGATE.search(text)):
        raise ConfigError(
            f'{".".join(map(printable, path))} holds half a character (a lone surrogate): '
            'write it anew.', field=path[2 if len(path) > 2 else 0])      # an entry's
    has_other_providers = any(key.provider == OPENAI or key.base_url for key in keys.values())
    return Config(document, profiles, keys, has_other_providers, **values)


def texts_in(document):
    """Yields (path, text) of every text and name, like (('keys', 'a', 'label'), 'Work').  Raises
    ConfigError for nesting that recursion, and so copying and writing, could not follow."""
    places: list[tuple[tuple, Any]] = [((), document)]
    while places:
        path, value = places.pop()
        if isinstance(value, str):
            yield path, value
        elif isinstance(value, (dict, list)):
            if len(path) > MAX_NESTING:
                raise ConfigError(f'The field {printable(path[0])[:60]} is nested too deeply.',
                                  field=path[0])
            entries = value.items() if isinstance(value, dict) else enumerate(value)
            for name, entry in entries:
                places += [((*path, name), entry), ((*path, name), name)]


def object_field(document, field):
    value = document.get(field)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f'{field} must be an object: {{ ... }}.')
    return value


def setting_value(document, setting):
    value = document.get(setting.name)
    may_hold_secret = setting.name == 'accessToken' or '@' in str(value) or '?' in str(value)
    refuse_wrong(setting.name, value, setting.check,
                 '' if may_hold_secret else f', not {json.dumps(value)[:60]}')
    return setting.default if value is None else value


def parse_key(provider, field, id, entry):
    if not NAME.fullmatch(id):
        raise ConfigError(f'{field}: a key\'s id may hold only letters, digits, ".", "_" and "-".')
    if not isinstance(entry, dict):
        raise ConfigError(f'{field} must be an object with a "token".')
    token = entry.get('token')
    if not isinstance(token, str) or not token.strip():
        raise ConfigError(f'{field} has no token: give it "token" (the secret, "env:NAME" or '
                          '"file:PATH"), or take the key out of the file.', field='token')
    token = token.strip()
    if not TOKEN.fullmatch(token) and not token.startswith('file:'):
        raise ConfigError(f'{field}.token holds a space or a character that no token has: '
                          'copy it again.', field='token')
    if token == 'env:' or token.startswith('file:') and token[5:6] not in ('/', '~'):
        raise ConfigError(f'{field}.token must name a variable ("env:NAME") or a whole path '
                          '("file:/path" or "file:~/path").', field='token')
    for name, check in KEY_FIELD_CHECKS.items():
        refuse_wrong(f'{field}.{name}', entry.get(name), check)
    oauth = entry.get('type') in ('oauth', 'oauth_token')
    return Key(f'{provider}:{id}', id, provider, token, entry.get('label') or id, oauth,
               entry.get('baseUrl'), entry.get('api'), entry.get('modelMapping') or {},
               entry.get('addedAt'))


def refuse_wrong(field, value, check, shown=''):
    """Raises ConfigError for a wrong value; null is the Node program's "not set"."""
    if value is not None and (complaint := check(value)):
        raise ConfigError(f'{field} {complaint}{shown}.', field=field.rpartition('.')[2])


def parse_profile(name, entry, keys):
    field = f'profiles.{printable(name)}'
    if not name or len(name) > 64 or not name.isprintable():
        raise ConfigError(f'{field}: a profile\'s name must have 1 to 64 printable characters.',
                          field='name')
    if not isinstance(entry, dict):
        raise ConfigError(f'{field} must be an object with a "port".')
    port = entry.get('port')
    if port is None or not is_whole(port) or not 0 <= port <= 65535:
        raise ConfigError(f'{field}.port must be a number from 1 to 65535 without quotes '
                          f'(0: any free one), not {json.dumps(port)[:60]}.', field='port')
    refuse_wrong(f'{field}.openaiModelMapping', entry.get('openaiModelMapping'), check_model_map)
    refuse_wrong(f'{field}.strategy', entry.get('strategy'), one_of(*STRATEGIES))
    return Profile(name, port, tuple(parse_order(field, entry, keys)),
                   entry.get('openaiModelMapping') or {}, entry.get('strategy') or 'order')


def parse_order(field, entry, keys):
    """The refs of a profile in order.  Keys that it does not name follow at the end, or after
    the others of their provider where there is no order of both."""
    order = entry.get('priorityOrder')
    if order is not None:
        refuse_missing(f'{field}.priorityOrder', order, {*keys, CLIENT_REF})
        return dict.fromkeys([*order, *keys])      # each once, the first place wins
    order = []
    for provider, order_field in ORDER_FIELDS.items():
        ids = entry.get(order_field) or []
        refuse_missing(f'{field}.{order_field}', ids, keys, f'{provider}:')
        order += [f'{provider}:{id}' for id in ids]
        order += [ref for ref, key in keys.items() if key.provider == provider]
    return dict.fromkeys(order)


def refuse_missing(field: str, names: list, known, prefix: str = '') -> None:
    refuse_wrong(field, names, check_texts)
    for name in (name for name in names if prefix + name not in known):
        meant = ' or '.join(f'"{ref}"' for ref in known if ref.partition(':')[2] == name)
        remedy = f'write {meant}' if meant else 'add that key, or take the name out of the order'
        raise ConfigError(f'{field} names {printable(name)!r}, which is no key: {remedy}.',
                          field=field.rpartition('.')[2])


def refuse_shared_ports(profiles):
    seen = {}
    for profile in profiles.values():
        other = seen.setdefault(profile.port, profile) if profile.port else profile
        if other is not profile:
            raise ConfigError(f'profiles.{profile.name}.port is {profile.port}, which profile '
                              f'{other.name} has already: give each its own port.',
                              field='port')


def dump_config(config: Config) -> bytes:
    """The file's bytes for a Config."""
    return (json.dumps(config.document, indent=2, ensure_ascii=False) + '\n').encode()


# ==============================================================================
# Configuration edits
# ==============================================================================
# Each returns a new Config.  parse_config checks it, so an edit cannot save what a start would
# refuse.

def add_key(config: Config, provider: str, token: str, label: str, added_at: str,
            base_url: str | None = None) -> tuple[Config, Key]:
    """(Config with the key, the new Key).  It follows the provider's other keys in every
    profile; the first OpenAI key switches openaiModelFallback on.  Raises ConfigError."""
    token = new_token(config, provider, token, base_url)
    refuse_token_as_label(label)
    document = document_with_profiles(config)
    entries = document[KEY_FIELDS[provider]] = document.get(KEY_FIELDS[provider]) or {}
    if provider == OPENAI and not entries:
        document['openaiModelFallback'] = True
    id = free_id(label or 'key', entries)
    entries[id] = {'token': token, 'label': label or id, 'type': token_type(provider, token),
                   'addedAt': added_at}
    if base_url:
        entries[id]['baseUrl'] = base_url
    for name, profile in document['profiles'].items():
        append_to_orders(profile, config.profiles[name].order, provider, id)
    edited = parse_config(document)
    return edited, edited.keys[f'{provider}:{id}']


def new_token(config, provider, token, base_url):
    """The token without blanks.  Raises ConfigError for a known one or another provider's."""
    token = token.strip()
    if not token:
        raise ConfigError('The token is empty: nothing was changed.', field='token')
    for key in config.keys.values():
        if key.token == token:
            raise ConfigError(f'This token is there already, as key {key.id}.', field='token')
    is_anthropic = token.startswith('sk-ant-')
    if provider == OPENAI and is_anthropic and not base_url:
        raise ConfigError('This is an Anthropic token ("sk-ant-"): add it with add-key.',
                          field='token')
    if provider == OPENAI or base_url or is_anthropic or is_reference(token):
        return token
    raise ConfigError('An Anthropic token begins with "sk-ant-" (or is "env:NAME" or '
                      '"file:PATH"); a key for another server needs --base-url, an OpenAI token '
                      'add-openai-key.', field='token')


def refuse_token_as_label(label):
    if SECRET.search(label):
        raise ConfigError('The label looks like a token: the token comes first, then the label.',
                          field='label')


def token_type(provider, token):
    """The type as the Node program names it."""
    if provider == OPENAI:
        return 'oauth_token' if is_jwt(token) else 'api_key'
    return 'oauth' if token.startswith('sk-ant-oat') else 'api-key'


def ids_in_order(order: tuple, provider: str) -> list:
    """['work', ...]: one provider's keys among the refs of an order."""
    return [ref.partition(':')[2] for ref in order if ref.startswith(f'{provider}:')]


def append_to_orders(profile, order, provider, id):
    """Writes the order in force into a profile's entry, the new key behind its provider's.  The
    Node program's files hold a keyOrder beside a priorityOrder: both are kept in step."""
    profile[ORDER_FIELDS[provider]] = [*ids_in_order(order, provider), id]
    if profile.get('priorityOrder') is not None:
        # OpenAI keys at the end are the last resort, and stay behind a new Claude key.
        end = len(order)
        while provider == ANTHROPIC and end and order[end - 1].startswith(f'{OPENAI}:'):
            end -= 1
        profile['priorityOrder'] = [*order[:end], f'{provider}:{id}', *order[end:]]


def free_id(label, taken):
    base = re.sub(r'[^a-z0-9]+', '-', label.lower()).strip('-')[:40] or 'key'
    candidates = [base, *(f'{base}-{n}' for n in range(2, len(taken) + 4))]
    # An address of the API ends in `reorder`, where others have an id.
    return next(id for id in candidates if id not in taken and id != 'reorder')


def refs_called(config: Config, key_id: str) -> list:
    """[ref, ...] of the keys with an id, or of the one with a ref.  Raises UnknownKey."""
    refs = [ref for ref, key in config.keys.items() if key_id in (ref, key.id)]
    if not refs:
        raise UnknownKey(key_id)
    return refs


def remove_key(config: Config, key_id: str) -> Config:
    """The Config without this key, taken out of every profile's orders too.  Raises UnknownKey,
    and ConfigError for an id that two keys have: 'anthropic:ID' or 'openai:ID' says which."""
    refs = refs_called(config, key_id)
    if len(refs) > 1:
        raise ConfigError(f'Two keys are called {key_id}: say which, {" or ".join(refs)}.')
    key = config.keys[refs[0]]
    document = copy.deepcopy(config.document)
    del document[KEY_FIELDS[key.provider]][key.id]
    for profile in (document.get('profiles') or {}).values():
        for field, name in ((ORDER_FIELDS[key.provider], key.id), ('priorityOrder', key.ref)):
            if profile.get(field):
                profile[field] = [entry for entry in profile[field] if entry != name]
    return parse_config(document)


def edit_key(config: Config, ref: str, changes: dict) -> Config:
    """The Config in which a key has another label, token or baseUrl: {'label': 'Work', ...};
    None takes a base URL away.  Raises UnknownKey, ConfigError."""
    if ref not in config.keys:
        raise UnknownKey(ref.partition(':')[2])
    key = config.keys[ref]
    document = copy.deepcopy(config.document)
    entry = document[KEY_FIELDS[key.provider]][key.id]
    entry.update({name: value for name, value in changes.items() if value is not None})
    if changes.get('baseUrl', '') is None:
        entry.pop('baseUrl', None)
    if 'token' in changes:
        others = config._replace(keys={r: k for r, k in config.keys.items() if r != ref})
        entry['token'] = new_token(others, key.provider, changes['token'], entry.get('baseUrl'))
        entry['type'] = token_type(key.provider, entry['token'])
    refuse_token_as_label(changes.get('label') or '')
    return parse_config(document)


def add_profile(config: Config, name: str, port: int | None = None,
                others: dict | None = None) -> Config:
    """The Config with another profile, on the next free port when none is given.  `others`
    may hold keyOrder, openaiKeyOrder, priorityOrder or strategy.  Raises ConfigError."""
    refuse_profile_name(config, name)
    ports = {profile.port for profile in config.profiles.values()}
    free = next(p for p in range(max(ports | {DEFAULT_PORT}) + 1, 2 ** 20) if p not in ports)
    document = document_with_profiles(config)
    document['profiles'][name] = {'port': free if port is None else port, **(others or {})}
    return parse_config(document)


def edit_profile(config: Config, name: str, changes: dict) -> Config:
    """The Config with a profile's name, port, order or strategy changed.  Raises ConfigError."""
    refuse_unknown_profile(config, name)
    changes = dict(changes)
    new_name = changes.pop('name', None) or name
    if new_name != name:
        refuse_profile_name(config, new_name)
    document = document_with_profiles(config)
    document['profiles'][name].update(changes)
    document['profiles'] = {new_name if old == name else old: entry        # in its old place
                            for old, entry in document['profiles'].items()}
    return parse_config(document)


def remove_profile(config: Config, name: str) -> Config:
    """The Config without a profile.  Raises UnknownProfile, and ConfigError for the last one."""
    refuse_unknown_profile(config, name)
    if len(config.profiles) == 1:
        raise ConfigError('The last profile cannot be removed: nothing would be served.')
    document = document_with_profiles(config)
    del document['profiles'][name]
    return parse_config(document)


def order_keys(config: Config, name: str, provider: str, ids: list) -> Config:
    """The Config in which a profile has one provider's keys in this order, each at a place where
    that provider had one.  Raises UnknownProfile, ConfigError."""
    refuse_unknown_profile(config, name)
    field = ORDER_FIELDS[provider]
    refuse_missing(f'profiles.{printable(name)}.{field}', ids, config.keys, f'{provider}:')
    named = [f'{provider}:{id}' for id in dict.fromkeys(ids)]
    order = config.profiles[name].order
    places = [ref for ref in order if ref.startswith(f'{provider}:')]
    wanted = iter([*named, *(ref for ref in places if ref not in named)])
    return order_profile(config, name,
                         [next(wanted) if ref in places else ref for ref in order])


def order_profile(config: Config, name: str, refs: list) -> Config:
    """The Config in which a profile has this order of both providers.  Orders of one provider
    are kept in step, for the Node program.  Raises UnknownProfile, ConfigError."""
    refuse_unknown_profile(config, name)
    document = document_with_profiles(config)
    document['profiles'][name]['priorityOrder'] = list(refs)
    edited = parse_config(document)
    entry, order = document['profiles'][name], edited.profiles[name].order
    for provider, field in ORDER_FIELDS.items():
        entry[field] = ids_in_order(order, provider)
    return parse_config(document)


class UnknownProfile(ConfigError):
    status, type = 404, 'not_found_error'


def refuse_unknown_profile(config: Config, name: str) -> None:
    if name not in config.profiles:
        raise UnknownProfile(f'There is no profile {printable(name)!r}. There are: '
                             f'{", ".join(map(printable, config.profiles))}.', field='profile')


def refuse_profile_name(config, name):
    if name in config.profiles:
        raise ConfigError(f'There is a profile {printable(name)!r} already.', field='name')
    if name == 'priority':            # an address of the API
        raise ConfigError('A profile cannot be called priority: choose another name.',
                          field='name')


def document_with_profiles(config):
    """A copy of the document in which the default profile is spelt out."""
    document = copy.deepcopy(config.document)
    document['profiles'] = document.get('profiles') or {'default': {'port': DEFAULT_PORT}}
    return document


def change_settings(config: Config, changes: dict) -> Config:
    """The Config with other top-level settings, {name: value}; None brings back a default.
    Raises ConfigError for an unknown name or a wrong value."""
    known = {setting.name for setting in SETTINGS}
    document = copy.deepcopy(config.document)
    for name, value in changes.items():
        if name not in known:
            raise ConfigError(f'There is no setting {printable(name)[:60]!r}. '
                              f'There are: {", ".join(sorted(known))}.', field=name)
        document[name] = value
        if value is None:
            del document[name]
    return parse_config(document)


# ==============================================================================
# Planning
# ==============================================================================
# Which key with which model, in which order.  Knows nothing of cooldowns: the plan is what
# would be tried if every key were ready.

class Attempt(NamedTuple):
    """One key tried with one model."""
    key: Key
    model: str | None      # as the key's provider calls it; None: the request names no model

    @property
    def kind(self):
        """What is the same for all keys of a provider: the provider and the model."""
        return self.key.provider, self.model


class Plan(NamedTuple):
    attempts: list            # [Attempt, ...] what is tried, and what the queue waits for
    last_resort: list         # [Attempt, ...] what is tried when those gave no answer


MAX_CHAIN = 5                 # models


def map_model(mapping: dict, model: str) -> str | None:
    """The name that `mapping` gives a model, or None.  The exact name wins, then the longest
    pattern ending in `*`; a `*` in the value stands for what the pattern's matched."""
    if model in mapping:
        return mapping[model]
    patterns = [name for name in mapping if name.endswith('*') and model.startswith(name[:-1])]
    pattern = max(patterns, key=len, default=None)
    return pattern and mapping[pattern].replace('*', model[len(pattern) - 1:])


def model_chain(mapping: dict, model: str | None) -> list:
    """[model, its fallback, the fallback's fallback, ...]: cycles cut, at most MAX_CHAIN."""
    chain = []
    while model and model not in chain and len(chain) < MAX_CHAIN:
        chain.append(model)
        model = map_model(mapping, model)
    return chain


#: Names that are OpenAI's own: asked for by name, they are not mapped by a mere `*`.
OPENAI_NAME = re.compile(r'gpt-|chatgpt-|o\d')


def map_to_openai(config, profile, key, model):
    """What an OpenAI key is asked for, by its own mapping, its profile's or the general one."""
    is_own_name = OPENAI_NAME.match(model)
    for mapping in (key.model_mapping, profile.model_mapping, config.openai_model_mapping):
        mapped = mapping.get(model) if is_own_name else map_model(mapping, model)
        if mapped:
            return mapped
    return model


def is_served(config: Config, key: Key) -> bool:
    """Whether requests may be sent to a key's provider."""
    return key.provider == ANTHROPIC or config.openai_model_fallback


def uses_clients_own(config: Config, profile: Profile) -> bool:
    """Whether the client's own credential has a place in this profile's plans."""
    return CLIENT_REF in profile.order or not any(
        is_served(config, key) for key in config.keys.values())


#: Batches, files and the like belong to the organization whose key made them.
MADE = re.compile(r'/v1/(?:messages/batches|(?!(?:messages|models|complete|chat)/)[a-z_]+)'
                  r'/([^/]+)(?:/.*)?')
MADE_ID = re.compile(rb'"id"\s*:\s*"([A-Za-z0-9_-]{1,128})"')


def made_id(path: str) -> str | None:
    """The id of the made thing that a path is about, or None."""
    match = MADE.fullmatch(path)
    return match and match.group(1)


def plan_attempts(config: Config, profile: Profile, models: list, client_key: Key | None) -> Plan:
    """The Plan: every Claude key of the profile for the first model, then for the next; OpenAI
    keys at their place for the first model, and behind the last Claude key, if there is one, as
    last resort.  `models` is a chain, or [None] for a request that names none.  `client_key`, the
    client's own (or None), has its place in the order, or is alone where no key is configured."""
    known = {**config.keys, CLIENT_REF: client_key}
    keys = [known[ref] for ref in profile.order if known[ref]]
    keys = [key for key in keys if is_served(config, key)] or ([client_key] if client_key else [])

    def attempt(key, model):
        is_mapped = key.provider == OPENAI and model
        return Attempt(key, map_to_openai(config, profile, key, model) if is_mapped else model)
    claude = [place for place, key in enumerate(keys) if key.provider == ANTHROPIC]
    last = claude[-1] + 1 if claude else len(keys)
    attempts = [attempt(key, models[0]) for key in keys[:last]]
    attempts += [Attempt(keys[place], model) for model in models[1:] for place in claude]
    return Plan(attempts, [attempt(key, models[0]) for key in keys[last:]])


def is_plan(key):
    """Whether a key is a plan's, whose tokens cost nothing more."""
    return key.oauth or key.token.startswith('sk-ant-oat') or key.token.endswith(
        '.credentials.json')      # Claude Code's own login


def order_attempts(attempts, rank):
    """The attempts with keys of one kind in the order of `rank(attempt)`, where they follow one
    another: a plan is never passed over for a paid key, nor a model or a provider."""
    runs = itertools.groupby(attempts, lambda a: (a.model, a.key.provider, is_plan(a.key)))
    return [attempt for _, run in runs for attempt in sorted(run, key=rank)]


#: Prompt tokens whose cache is worth a second of waiting.
TOKENS_PER_SECOND = 20_000


def is_worth_waiting(left_s, tokens, most_s):
    """Whether a conversation waits for its own key to come back, rather than move: to write its
    cache anew takes time too, and counts towards the other key's limits."""
    return left_s <= most_s and tokens >= TOKENS_PER_SECOND * left_s


# ==============================================================================
# Request bodies
# ==============================================================================
# A request is changed as little as possible: its bytes go through untouched unless the
# model changes or a repair is due.

#: Claude Code and the load of most clients name the model first: no need to parse a megabyte.
MODEL_FIRST = re.compile(rb'\s*\{\s*"model"\s*:\s*"([A-Za-z0-9._:@/\[\]-]{1,256})"')
STREAM_NAME, STREAM_FIELD = b'"stream"', re.compile(rb'"stream"\s*:\s*true')
EDGE_BYTES = 1024
#: How far the beginnings of a conversation are read.
OPENING_BYTES, USER_ID_BYTES = 65_536, 4096
#: What the signature of thinking from OpenAI begins with: it holds nothing, or encrypted
#: reasoning, which goes back to OpenAI and never to Anthropic.
NO_PAYLOAD, PAYLOAD = 'cfo0:', 'cfo1:'
#: In a body with thinking that Anthropic did not sign: an empty signature, in compact or spaced
#: JSON, or one of these.  Plain searches cost a tenth of a pattern's.
UNSIGNED = (b'"signature":""', b'"signature": ""', b'"signature":null', b'"signature": null',
            b'"cfo0:', b'"cfo1:')


def is_near_an_end(data, name):
    """Whether a body holds a name near one end: to search a whole megabyte takes 0.4 ms."""
    return data.find(name, 0, OPENING_BYTES) >= 0 or data.find(
        name, max(0, len(data) - 2 * OPENING_BYTES)) >= 0


class RequestBody:
    """A request's bytes, parsed only when something needs it; `model` may be None."""

    def __init__(self, data: bytes | bytearray):
        self.data = data
        match = MODEL_FIRST.match(data)
        self.model = match.group(1).decode() if match else text_or_none(self.json.get('model'))

    @functools.cached_property
    def json(self) -> dict:
        """The JSON object; {} for a body of another kind, which the upstream will refuse."""
        return object_or_none(self.data) or {}

    @property
    def is_streamed(self) -> bool:
        return self.json.get('stream') is True

    @functools.cached_property
    def wants_stream(self) -> bool:
        """Whether the ends of a body, where clients say so, want a stream.  `is_streamed` is
        exact, and costs milliseconds for a megabyte."""
        data = self.data
        for start in data.find(STREAM_NAME, 0, EDGE_BYTES), data.rfind(STREAM_NAME, -EDGE_BYTES):
            if start >= 0 and STREAM_FIELD.match(data, start):
                return True
        return is_near_an_end(data, STREAM_NAME) and self.is_streamed

    def for_model(self, model: str) -> bytes | bytearray:
        """The same bytes with another model."""
        if model == self.model:
            return self.data
        if match := MODEL_FIRST.match(self.data):
            return bytes(self.data[:match.start(1)]) + model.encode() + self.data[match.end(1):]
        return dump_body({**self.json, 'model': model})


#: How long a prompt cache lives after its last use: as usual, and where `ttl` says 1h.
CACHE_S, LONG_CACHE_S = 300, 3600
SESSION_FIELD = 'x-claude-code-session-id'
USER_ID = re.compile(rb'"user_id"\s*:\s*("(?:[^"\\]|\\.){1,1000}")')


def conversation_digest(headers, data):
    """What a conversation is known by: its client's session, else the beginnings of one that has
    its prompt cached; None for a request that belongs to none.  A megabyte is not parsed."""
    session = headers.get(SESSION_FIELD) or session_of_user(data)
    if not session and is_near_an_end(data, b'"cache_control"'):
        session = opening(data, b'"system"') + opening(data, b'"messages"')
    return hashlib.sha256(session.encode('utf-8', 'replace')).hexdigest()[:16] if session else None


def session_of_user(data):
    """The session in metadata.user_id: a JSON text with `session_id`, or ..._session_ID."""
    match = (USER_ID.search(data, 0, USER_ID_BYTES)
             or USER_ID.search(data, max(0, len(data) - USER_ID_BYTES)))
    if not match:
        return None
    user_id = json.loads(match.group(1), strict=False)
    if user_id.startswith('{') and (named := object_or_none(user_id)):
        return text_or_none(named.get('session_id'))
    return user_id.rpartition('_session_')[2] if '_session_' in user_id else None


def opening(data, name):
    """The system prompt, or the first message, as a text without cache marks: these move."""
    start = data.find(name) + len(name)
    text = bytes(data[start:start + OPENING_BYTES]).decode('utf-8', 'replace').lstrip(' \t\r\n:[')
    try:
        value, _ = json.JSONDecoder(strict=False).raw_decode(text)
    except (ValueError, RecursionError):          # longer than that
        return text
    return re.sub(r', "cache_control": \{[^{}]*\}', '', json.dumps(value))


def cache_lifetime_s(data):
    """How long what this request caches lives after each use."""
    return LONG_CACHE_S if is_near_an_end(data, b'"1h"') else CACHE_S


def without_thinking(body: dict, is_unwanted=lambda block: True) -> dict:
    """The body without the unwanted thinking blocks of assistant turns, and without turns that
    held nothing else: the API refuses empty ones."""
    if not isinstance(body.get('messages'), list):
        return body
    messages = []
    for message in body['messages']:
        content = message.get('content') if isinstance(message, dict) else None
        if isinstance(content, list) and message.get('role') == 'assistant':
            kept = [block for block in content if as_dict(block).get('type') not in
                    ('thinking', 'redacted_thinking') or not is_unwanted(block)]
            if content and not kept:
                continue
            message = {**message, 'content': kept}
        messages.append(message)
    return {**body, 'messages': messages}


def without_fast_mode(data: bytes, betas: list) -> tuple[bytes, list]:
    """(body bytes, beta names) of a request without fast mode."""
    body = {name: value for name, value in loads_object(data).items() if name != 'speed'}
    return dump_body(body), [beta for beta in betas if not beta.startswith('fast-mode')]


def is_unsigned(block):
    seal = block.get('signature' if block.get('type') == 'thinking' else 'data')
    return not seal or str(seal).startswith((NO_PAYLOAD, PAYLOAD))


def drop_unsigned_thinking(data: bytes | bytearray) -> bytes | bytearray:
    """The body's bytes without thinking that Anthropic did not sign, of another provider's
    answers; the same bytes where there is none."""
    if b'thinking"' not in data or not any(mark in data for mark in UNSIGNED):
        return data
    body = object_or_none(data) or {}
    stripped = without_thinking(body, is_unsigned)
    return data if stripped == body else dump_body(stripped)


# ==============================================================================
# Targets
# ==============================================================================
# Where a key's requests go, and with which head.  Pure: a token comes in as a value.

OAUTH_BETA = 'oauth-2025-04-20'
#: Seconds that a stream may take to its first content.  Another server than the providers' own
#: may read a long prompt for many minutes; its client is pinged meanwhile.
STREAM_FIRST_BYTE_S, OTHER_FIRST_BYTE_S = 300, 3600
#: Behind an OpenAI base URL, by wire format.
WIRE_PATHS = {CHAT_COMPLETIONS: '/chat/completions', RESPONSES: '/responses'}


class Target(NamedTuple):
    """Where an attempt goes."""
    wire: str                 # MESSAGES, CHAT_COMPLETIONS or RESPONSES
    base_url: str
    model: str | None = None
    is_codex: bool = False    # ChatGPT's own server: Responses with limits
    is_openai: bool = False   # OpenAI's own host, which knows all its fields

    @property
    def answerer(self) -> tuple:
        """Who answers there, as far as it says what a request may hold."""
        return self.base_url, self.model


class BaseUrl(NamedTuple):
    scheme: str
    host: str
    port: int
    host_field: str           # what goes into Host
    path: str                 # a prefix without a closing slash


@functools.lru_cache(maxsize=64)
def parse_base_url(url: str) -> BaseUrl:
    parts = urllib.parse.urlsplit(url)
    port = parts.port or (443 if parts.scheme == 'https' else 80)
    path = parts.path.rstrip('/').removesuffix('/v1')       # our targets begin with /v1
    return BaseUrl(parts.scheme, parts.hostname or '', port, parts.netloc, path)


OWN_HOSTS = frozenset(parse_base_url(setting.default).host for setting in SETTINGS
                      if setting.check is check_base_url)


def stream_first_byte_s(config: Config, base_url: str) -> float:
    """Seconds that a stream of a server may take to its first content."""
    if config.first_byte_ms is not None:
        return config.first_byte_ms / 1000
    is_own = parse_base_url(base_url).host in OWN_HOSTS
    return STREAM_FIRST_BYTE_S if is_own else OTHER_FIRST_BYTE_S


def is_login(key: Key, token: str) -> bool:
    """Whether an OpenAI key is a ChatGPT login, which goes to Codex.  With a server of its own
    a JSON Web Token is that server's API key."""
    return key.provider == OPENAI and not key.base_url and is_jwt(token)


def account_id(claims: dict) -> str | None:
    """The ChatGPT account in a login's claims, or None."""
    account = as_dict(claims.get('https://api.openai.com/auth')).get('chatgpt_account_id')
    return account if isinstance(account, str) and TOKEN.fullmatch(account) else None


def find_target(config: Config, key: Key, token: str, model: str | None) -> Target:
    """The Target of an attempt."""
    if key.provider == ANTHROPIC:
        return Target(MESSAGES, key.base_url or config.anthropic_base_url, model)
    if is_login(key, token):
        return Target(RESPONSES, config.codex_base_url, model, is_codex=True)
    base_url = key.base_url or config.openai_base_url
    is_openai = parse_base_url(base_url).host == 'api.openai.com'
    return Target(key.api or config.openai_api, base_url, model, is_openai=is_openai)


class UpstreamRequest(NamedTuple):
    """One attempt as it is sent."""
    base: BaseUrl
    method: str
    head: bytes
    body: bytes | bytearray


def build_request(request, key: Key, base_url: str, token: str, data: bytes | bytearray,
                  betas: list) -> UpstreamRequest:
    """The UpstreamRequest of one attempt; `data` and `betas` may differ from the client's."""
    base = parse_base_url(base_url)
    credentials = request.credentials
    if key.id != CLIENT_REF:
        is_bearer = is_oauth(key, token)
        credentials = [key_field(token, is_bearer)]
        if is_bearer and OAUTH_BETA not in betas:
            betas = [*betas, OAUTH_BETA]
    fields = [('host', base.host_field), *credentials]
    fields += [('anthropic-beta', ','.join(betas))] if betas else []
    fields += [('content-length', len(data))] if request.has_body else []
    head = request_head(f'{request.method} {base.path}{request.target} HTTP/1.1',
                        [*fields, ('accept-encoding', 'identity')], request.forwarded_head)
    return UpstreamRequest(base, request.method, head, data)


def is_oauth(key, token):
    """Whether an Anthropic key's token goes as Bearer, with its beta."""
    return key.oauth or token.startswith('sk-ant-oat')


def key_field(token, is_bearer):
    """The header field that carries a token."""
    return ('authorization', f'Bearer {token}') if is_bearer else ('x-api-key', token)


def request_head(first_line: str, fields, more: str = '') -> bytes:
    """The bytes of a request's head; `more` are whole lines."""
    lines = [first_line, *(f'{name}: {value}' for name, value in fields)]
    return ('\r\n'.join(lines) + '\r\n' + more + '\r\n').encode('latin-1')


def common_fields(target, token, is_bearer=True):
    """[(name, value), ...] of a request that holds none of the client's header fields."""
    host = ('host', parse_base_url(target.base_url).host_field)
    account = [('chatgpt-account-id', account_id(jwt_claims(token)))] if target.is_codex else []
    return [host, key_field(token, is_bearer), ('accept-encoding', 'identity'),
            ('user-agent', f'{PROGRAM}/{VERSION}'), *account]


def build_openai_request(target: Target, token: str, body: dict,
                         session: str | None) -> UpstreamRequest:
    """The UpstreamRequest of a translated attempt.  `session` names the conversation to Codex."""
    data = dump_body(body)
    fields = [*common_fields(target, token),
              ('content-type', 'application/json'), ('content-length', len(data)),
              ('accept', 'text/event-stream' if body.get('stream') else 'application/json')]
    if target.is_codex:
        fields += [('openai-beta', 'responses=experimental'), ('originator', PROGRAM)]
        fields += [('session_id', session)] if session else []
    head = request_head(f'POST {openai_path(target, WIRE_PATHS[target.wire])} HTTP/1.1', fields)
    return UpstreamRequest(parse_base_url(target.base_url), 'POST', head, data)


def openai_path(target, end):
    """The path behind a base URL, whose own path and query stay: only a bare host gets /v1."""
    parts = urllib.parse.urlsplit(target.base_url)
    path = (parts.path.rstrip('/') or '/v1').removesuffix(WIRE_PATHS[target.wire]) + end
    return f'{path}?{parts.query}' if parts.query else path


def models_path(target: Target) -> str:
    """Where a target's server lists its models."""
    if target.wire == MESSAGES:
        return f'{parse_base_url(target.base_url).path}{MODELS_PATH}?limit=1'
    path = openai_path(target, '/models')
    return f'{path}?client_version={VERSION}' if target.is_codex else path


def build_key_test(target: Target, key: Key, token: str) -> UpstreamRequest:
    """The UpstreamRequest of a KeyTest."""
    is_messages = target.wire == MESSAGES
    is_bearer = not is_messages or is_oauth(key, token)
    fields = common_fields(target, token, is_bearer)
    fields += [('anthropic-version', '2023-06-01')] if is_messages else []
    fields += [('anthropic-beta', OAUTH_BETA)] if is_messages and is_bearer else []
    head = request_head(f'GET {models_path(target)} HTTP/1.1', fields)
    return UpstreamRequest(parse_base_url(target.base_url), 'GET', head, b'')


# ==============================================================================
# Repairs
# ==============================================================================
# What a refused request becomes: learnt from the upstream's complaint, not from a list of models.

class Repair(NamedTuple):
    """How to send a request without one thing that a model lacks: `pattern` finds the complaint
    of a 400, its groups the subject, which `edit(body, subject)` or a beta's header loses."""
    name: str
    pattern: str
    edit: Callable = lambda body, subject: body


def without_path(value: Any, path: list | tuple) -> Any:
    """`value` without the field at `path` (names; a number means every item of that list).
    Names that are not there are skipped: Anthropic's error paths also hold type tags."""
    if not path:
        return value
    name, rest = path[0], path[1:]
    if isinstance(value, list):
        return [without_path(item, rest if name.isdigit() else path) for item in value]
    if not isinstance(value, dict):
        return value
    if name not in value:
        return without_path(value, rest)
    if not rest:
        return {key: item for key, item in value.items() if key != name}
    return {**value, name: without_path(value[name], rest)}


def leave_out_thinking(body, subject):
    """Without the `thinking` field, and the `context_management` edits that need it."""
    body = without_path(body, ['thinking'])
    management = as_dict(body.get('context_management'))
    edits = [edit for edit in as_list(management.get('edits'))
             if 'thinking' not in str(as_dict(edit).get('type'))]
    if edits:
        return {**body, 'context_management': {**management, 'edits': edits}}
    return without_path(body, ['context_management'])


def with_output_limit(body, subject):
    """With at most so many output tokens ('8192'), less what the input takes ('8192 100')."""
    limit, *taken = map(int, subject.split())
    limit = max(1, limit - sum(taken))
    names = ('max_completion_tokens', 'max_output_tokens', 'max_tokens')
    return {**body, **{name: min(filter(is_whole, (limit, body[name])))
                       for name in names if name in body}}
class Needed(NamedTuple):
    """A repair that a complaint asks for."""
    name: str
    subject: str              # what the pattern's groups found


#: Repairs of one conversation: they say nothing about the model.
CONVERSATION_REPAIRS = (
    Repair('signature', r'signature.{0,5} in .{0,3}(?:redacted_)?thinking|thinking\.signature',
           lambda body, subject: without_thinking(body)),
    Repair('missing_thinking', r'must start with a thinking block|expected .{0,3}thinking.{0,60}'
           r'found', leave_out_thinking),
)
#: Repairs for a model, whatever the conversation.
MODEL_REPAIRS = (
    Repair('beta', r'(?<![a-z0-9-])([a-z][a-z0-9-]*-\d{4}-\d\d-\d\d)[`"\']*.{0,20}anthropic-beta'
                   r'|anthropic-beta\D{0,40}?([a-z][a-z0-9-]*-\d{4}-\d\d-\d\d)'),
    Repair('field', r'^([A-Za-z_][\w.-]*): extra inputs are not permitted',
           lambda body, subject: without_path(body, subject.split('.'))),
    Repair('max_tokens', r'max_tokens: \d+ > (\d{1,9})', with_output_limit),
    Repair('effort', r'\beffort\b', lambda body, subject: without_path(without_path(
        body, ['output_config', 'effort']), ['messages', '0', 'output_config', 'effort'])),
    Repair('output_config', r'output_config',
           lambda body, subject: without_path(body, ['output_config'])),
    Repair('context_management', r'context_management',
           lambda body, subject: without_path(body, ['context_management'])),
    Repair('thinking', r'thinking', leave_out_thinking),
)
REPAIRS = CONVERSATION_REPAIRS + MODEL_REPAIRS
PASSING_REPAIRS = ('room', *(repair.name for repair in CONVERSATION_REPAIRS))


def is_about_model(name: str, subject: str) -> bool:
    """Whether a repair helps with any conversation on the same model."""
    return name not in PASSING_REPAIRS and not subject.startswith(('messages', 'input'))


#: What a request to OpenAI cannot lose without asking for something else.
ESSENTIAL = frozenset((
    'model', 'messages', 'input', 'instructions', 'stream', 'tools', 'tool_choice', 'store',
    'response_format', 'text', 'format', 'role', 'content', 'type', 'name', 'function',
    'parameters', 'arguments', 'id', 'call_id', 'tool_call_id', 'tool_calls', 'output'))
TOKEN_LIMITS = {'max_tokens': 'max_completion_tokens', 'max_completion_tokens': 'max_tokens'}


def without_parameter(body, subject):
    """Without the parameter that OpenAI calls 'reasoning.effort' or 'tools[0].strict'; the limit
    of tokens, which has an old and a new name, gets the other."""
    if subject in body and (other_name := TOKEN_LIMITS.get(subject)):
        body = {**body, other_name: body[subject]}
    return without_path(body, re.findall(r'[\w-]+', subject))


EFFORTS = ('none', 'minimal', 'low', 'medium', 'high', 'xhigh', 'max')


def nearest_effort(effort: str, accepted) -> str | None:
    """The highest accepted effort but `none` that is not above this one, else the lowest."""
    ranked = [name for name in EFFORTS[1:] if name in accepted]
    below = [name for name in ranked if EFFORTS.index(name) <= EFFORTS.index(effort)]
    return (below[-1:] or ranked[:1] or [None])[0]


def with_accepted_effort(body, subject):
    """With the nearest of the efforts that a 400 lists."""
    reasoning = as_dict(body.get('reasoning'))
    effort = body.get('reasoning_effort') or reasoning.get('effort')
    accepted = re.findall(r'\w+', subject)
    if effort not in EFFORTS or effort in accepted:
        return body
    nearest = nearest_effort(effort, accepted)
    if nearest is None:
        return without_path(without_path(body, ['reasoning_effort']), ['reasoning'])
    if reasoning:
        return {**body, 'reasoning': {**reasoning, 'effort': nearest}}
    return {**body, 'reasoning_effort': nearest}


def with_short_descriptions(body, subject):
    """With tool descriptions cut to what a server takes."""
    def cut(tool):
        tool = as_dict(tool)
        if 'function' in tool:
            return {**tool, 'function': cut(tool['function'])}
        text = tool.get('description')
        return {**tool, 'description': text[:int(subject)]} if text else tool
    return {**body, 'tools': [cut(tool) for tool in as_list(body.get('tools'))]}


#: The same for OpenAI and compatible servers; the body is a translated one.
OPENAI_REPAIRS = (
    Repair('use_responses', r'use (?:the )?/?v1/responses'),
    Repair('output_limit', r'at most (\d{1,9}) (?:completion|output) tokens|_tokens.{0,3} must be '
                           r'less than or equal to \W?(\d{1,9})|range of \w+_tokens should be '
                           r'\[\d+, ?(\d{1,9})', with_output_limit),
    Repair('room', r'maximum context length is (\d{1,9}) tokens.{0,60}requested \d+ tokens '
                   r'\((\d{1,9}) in the messages(?:, (\d{1,9}) in the functions)?',
           with_output_limit),
    Repair('room', r'maximum context length is (\d{1,9}) tokens and your request has (\d{1,9}) '
                   r'input tokens', with_output_limit),
    Repair('effort', r'^(?=.*effort).*supported values are:? (.{0,120})', with_accepted_effort),
    Repair('descriptions', r'description.{0,80}maximum length (?:of )?(\d{1,6})',
           with_short_descriptions),
    Repair('parameter', r'(?:unsupported|unknown|not supported|not permitted).*'
                        r'\(parameter ([\w.\[\]-]+)\)$', without_parameter),
    Repair('parameter', r'(?:not support|unsupported|unknown|unrecognized|unexpected) (?:request '
                        r')?(?:parameter|argument|keyword argument|field|property|value|name)s?'
                        r'(?: supplied)?:? *[`\'"]?([A-Za-z_][\w.\[\]-]*)', without_parameter),
    Repair('parameter', r'(?:^|[\s.])([A-Za-z_][\w.]*): extra (?:inputs|fields) (?:are )?not '
                        r'permitted', without_parameter),
    Repair('parameter', r'[`\'"]([A-Za-z_][\w.\[\]-]*)[`\'"] (?:cannot both|(?:parameter '
                        r')?is (?:not (?:supported|allowed|permitted)|unsupported|immutable))',
           without_parameter),
)


def find_repair(message: str, repairs: tuple = REPAIRS) -> Needed | None:
    """What a 400's message needs by the first repair that fits, or None."""
    for repair in repairs:
        if match := re.search(repair.pattern, message[:MAX_MESSAGE_CHARS], re.IGNORECASE):
            return Needed(repair.name, ' '.join(group for group in match.groups() if group))
    return None


def find_openai_repair(message: str) -> Needed | None:
    """The same for OpenAI's 400s; None also where a repair would leave nothing to ask for."""
    needed = find_repair(message, OPENAI_REPAIRS)
    if needed and needed.name == 'room':
        size, *taken = map(int, needed.subject.split())
        return needed if sum(taken) < size else None
    if needed and needed.name == 'parameter':
        names = re.findall(r'[A-Za-z_]\w*', needed.subject)
        return needed if names and names[-1] not in ESSENTIAL else None
    return needed


def edit_body(body: dict, needed, repairs=REPAIRS) -> dict:
    """The body after some [Needed, ...]."""
    by_name = {repair.name: repair for repair in repairs}
    for name, subject in needed:
        body = by_name[name].edit(body, subject)
    return body


def apply_repairs(needed, data: bytes, betas: list) -> tuple[bytes, list]:
    """(body bytes, beta names) of a Messages request after some [Needed, ...]."""
    unwanted = {subject for name, subject in needed if name == 'beta'}
    body = edit_body(loads_object(data), needed)
    return dump_body(body), [beta for beta in betas if beta not in unwanted]


def changes_request(needed: Needed, target: Target, body: dict) -> bool:
    """Whether a repair of OPENAI_REPAIRS would send another request than this."""
    if needed.name == 'use_responses':
        return target.wire == CHAT_COMPLETIONS
    return edit_body(body, [needed], OPENAI_REPAIRS) != body


# ==============================================================================
# Classification
# ==============================================================================
# What an upstream's answer means.  Knows statuses, headers and texts, but no other key: a rule
# says "this key and model, for 30 seconds", Serving acts.

class Step(enum.Enum):
    """What follows an answer."""
    RELAY = 'the client gets it'
    REPAIR = 'the same key once more, without what it complained about'
    NEXT_KEY = 'the next key; after the keys, the next model'
    STOP = 'nothing more is tried'


class Scope(enum.Enum):
    """What a cooldown covers."""
    SERVER = 'all keys of the server'
    KEY = 'the key, for every model'
    PAIR = 'the key, for this model'


class Final(enum.Enum):
    """What the client gets when nothing is left to try: status, Anthropic's type, words.  Where
    attempts failed differently the first of these counts.  Waiting changes no hopeless one."""
    TIMEOUT = (504, 'timeout_error', 'the upstream gave no answer')
    LIMITED = (429, 'rate_limit_error', 'every key is exhausted')
    OVERLOADED = (529, 'overloaded_error', 'the model is overloaded')
    SERVER = (502, 'api_error', 'the upstream failed')
    BLOCKED = (502, 'api_error', 'no key may be used', True)
    UNAUTHORIZED = (502, 'api_error', 'no key is accepted', True)     # 401 of a single key
    VERBATIM = (None, None, 'the upstream failed', True)              # the answer itself

    def __init__(self, status, type, lead, is_hopeless=False):
        self.status, self.type, self.lead, self.is_hopeless = status, type, lead, is_hopeless


class Again(enum.Enum):
    """When the same key is tried once more, after a moment."""
    NEVER = 0
    FIRST = 1                 # before another key
    ALONE = 2                 # only if no other key is ready


#: All requests together ask so often, at most, a key whose cooldown only a person could end.
HOPE_S = 5
#: The seconds after which a cooldown is asked all the same, by a request that has nothing else
#: left, the last of them repeated: always; at once, and then in passing; seldom.
ANY_TIME, IN_PASSING, LATER = (0,), (0, HOPE_S), (300, 600, 900, 3600)


class Answer(NamedTuple):
    """An upstream's answer, as far as its meaning goes."""
    status: int
    headers: dict             # lower-case name -> value
    error_type: str
    message: str              # error.message, or the body's beginning when it has no such shape
    now: float                # unix seconds by the upstream's clock, for reset times
    path: str = MESSAGES_PATH
    model: str | None = None
    is_fallback: bool = False
    details: dict = {}        # the body's `error` object; {} of what was no JSON error
    is_relays: bool = False   # of a server that is not the provider's own


class Rule(NamedTuple):
    """One row of the policy: an answer with one of `statuses` (empty: any) for which `when`
    finds something means `step`; a REPAIR's `when` finds what is Needed.  What cools is `scope`
    (None: nothing), for the seconds that `hint(answer)` reads, else for `cooldown_s`, doubling up
    to `doubles_to_s` while it repeats."""
    name: str
    statuses: tuple | range
    step: Step
    final: Final = Final.VERBATIM
    when: Callable = lambda answer: True
    scope: Scope | None = None
    cooldown_s: float = 0
    doubles_to_s: float = 0
    hint: Callable = lambda answer: None
    again: Again = Again.NEVER
    tries: int = 1_000        # after so many such answers a model is given up
    strikes: int = 1          # cools at so many in a row
    asks_again: tuple = ()    # where the end is not certain: ANY_TIME, IN_PASSING or LATER
    other_models: bool = True
    other_providers: bool = True
    waits: bool = True        # whether a request may queue for the end of such a cooldown
    attention: bool = False   # a person has to do something about this key
    words: str = ''           # why a key cools, as a person says it


class Outcome(NamedTuple):
    """What one attempt came to."""
    rule: Rule
    status: int               # 0 when there was no answer
    message: str
    hint_s: float | None = None       # after which the upstream lets it be tried again
    repair: Needed | None = None      # of a REPAIR step
    ends_s: float | None = None       # when the limit itself ends: then, or later
    limit_fields: tuple = ()          # ((name, value), ...) of the answer's rate limits


#: A hint further away is a mistake of the upstream's: the longest window is 7 days.
ABSURD_HINT_S = 31 * 86400
NUMBER = re.compile(r'([0-9]{1,12}(?:\.[0-9]{1,9})?)\s*(?:,|$)')


def unix_seconds(moment):
    """A datetime as unix seconds; without a zone (a field that came twice) it is UTC."""
    return moment.replace(tzinfo=moment.tzinfo or timezone.utc).timestamp()


def upstream_now(headers: dict, now: float) -> float:
    """The unix seconds of an upstream's Date field; `now` where it has none."""
    try:
        return unix_seconds(email.utils.parsedate_to_datetime(headers.get('date', '')))
    except (TypeError, ValueError, OverflowError):
        return now


def sane_hint(seconds):
    return seconds if seconds is not None and seconds <= ABSURD_HINT_S else None


def retry_after_s(answer):
    """Seconds to wait from retry-after-ms, else from retry-after; None without either."""
    milliseconds = parse_duration(answer.headers.get('retry-after-ms', '').partition(',')[0])
    seconds = None if milliseconds is None else sane_hint(milliseconds / 1000)
    if seconds is not None:
        return seconds
    return parse_retry_after(answer.headers.get('retry-after'), answer.now)


def parse_retry_after(value, now):
    """Seconds to wait from a Retry-After field (RFC 9110 section 10.2.3), also with a fraction or
    twice in a head; a past date gives 0.  None when absent, unreadable or absurd."""
    if number := NUMBER.match((value or '').strip()):
        return sane_hint(float(number.group(1)))
    try:
        return sane_hint(max(0.0, unix_seconds(email.utils.parsedate_to_datetime(value)) - now))
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


def parse_reset(value, now):
    """Seconds until a reset in unix seconds or RFC 3339; None when unreadable, past or absurd."""
    value = (value or '').partition(',')[0].strip()
    number = NUMBER.match(value)
    try:
        resets = float(number.group(1)) if number else unix_seconds(
            datetime.fromisoformat(value.upper().replace('Z', '+00:00')))
    except (ValueError, OverflowError):
        return None
    return sane_hint(resets - now) if resets > now else None


UNIFIED = 'anthropic-ratelimit-unified-'
WINDOW_STATUS = re.compile(UNIFIED + '(?:(.+)-)?status')
#: The windows of all models, and the summary where it names no model family.
KEY_WINDOWS = frozenset(('5h', '7d', ''))
FAMILY_CLAIM = re.compile('(?:five_hour|seven_day)_(?!overage).+')
FAMILY_FIELD = re.compile(UNIFIED + r'(\d+[hd]_.+)-(?:utilization|reset|status)')
#: A window may end while its refusal is on its way: Date has whole seconds.
JUST_NOW_S = 5
REMAINING = re.compile(r'(anthropic-ratelimit-.+)-remaining')


def rejected_windows(headers):
    """{window: its reset as a text} of the unified windows that are rejected: '5h', '7d_opus',
    found by the headers' shape.  The summary stands for one ('', or the family that it claims)
    where no other is.  'overage' is no window: it says whether extra usage is bought."""
    summary_reset, windows = headers.get(UNIFIED + 'reset', ''), {}
    for name, value in headers.items():
        match = WINDOW_STATUS.fullmatch(name)
        if match and value.strip().lower() == 'rejected' and match.group(1) != 'overage':
            reset_name = name[:-len('status')] + 'reset'
            windows[match.group(1) or ''] = headers.get(reset_name) or summary_reset
    if '' in windows and len(windows) > 1:
        del windows['']
    claim = headers.get(UNIFIED + 'representative-claim', '')
    return {claim: windows['']} if '' in windows and FAMILY_CLAIM.fullmatch(claim) else windows


def seconds_to_window_reset(answer):
    """Until the last of the key's spent windows is over, or the last of a family's."""
    windows, then = rejected_windows(answer.headers), answer.now - JUST_NOW_S
    resets = [parse_reset(windows[window], then)
              for window in KEY_WINDOWS.intersection(windows) or windows]
    known = [max(0, reset - JUST_NOW_S) for reset in resets if reset is not None]
    return max(known) if known else retry_after_s(answer)


def seconds_to_limit_reset(answer):
    """From retry-after, else from the latest reset of a limit whose remainder is 0."""
    if (seconds := retry_after_s(answer)) is not None:
        return seconds
    spent = [match.group(1) for match in map(REMAINING.fullmatch, answer.headers)
             if match and answer.headers[match.group()].strip() == '0']
    resets = [parse_reset(answer.headers.get(f'{limit}-reset'), answer.now) for limit in spent]
    return max(filter(None, resets), default=None)


def seconds_to_regained_access(answer):
    """From "You will regain access on 2026-03-01 at 00:00 UTC."; None when it has no date."""
    match = re.search(r'regain access on (\d{4}-\d\d-\d\d)(?: at (\d\d:\d\d))?', answer.message)
    if not match:
        return None
    return parse_reset(f'{match.group(1)}T{match.group(2) or "00:00"}:00Z', answer.now)


class Limit(NamedTuple):
    """One rate limit as an answer's header fields have it."""
    name: str                 # '5h', '7d', 'requests', 'input tokens' ...
    used: float               # 0 to 1
    resets_s: float | None    # seconds from then
    status: str | None = None # 'allowed', 'allowed_warning', 'rejected' of the unified ones


def read_limits(headers: dict, now: float) -> list:
    """[Limit, ...] of Anthropic's, OpenAI's and Codex's header fields, in their order."""
    limits = []
    for field, value in headers.items():
        for pattern, read in LIMIT_FIELDS:
            if match := pattern.fullmatch(field):
                with contextlib.suppress(ValueError, ZeroDivisionError):  # an unreadable number
                    limits.append(read(headers, match.group(1), float(value), now))
    return [limit for limit in limits if math.isfinite(limit.used)]


def unified_limit(headers, name, used, now):
    field = f'{UNIFIED}{name}-'
    return Limit(name, used, parse_reset(headers.get(field + 'reset'), now),
                 headers.get(field + 'status'))


def plain_limit(headers, name, remaining, now):
    field = f'anthropic-ratelimit-{name}-'
    used = 1 - remaining / float(headers.get(field + 'limit', 0))
    return Limit(name.replace('-', ' '), used, parse_reset(headers.get(field + 'reset'), now))


def openai_limit(headers, name, remaining, now):
    used = 1 - remaining / float(headers.get(f'x-ratelimit-limit-{name}', 0))
    return Limit(name, used, sane_hint(parse_duration(headers.get(f'x-ratelimit-reset-{name}'))))


def codex_limit(headers, name, percent, now):
    field = f'x-codex-{name}-'
    hours = float(headers.get(field + 'window-minutes', 0)) / 60
    called = f'{hours / 24:g}d' if hours >= 48 else f'{hours:g}h' if hours else name
    family = name.rpartition('-')[0]
    called += f'_{family}' if family and hours else ''
    resets_s = sane_hint(parse_duration(headers.get(field + 'reset-after-seconds')))
    return Limit(called, percent / 100, resets_s)


LIMIT_FIELDS = tuple((re.compile(pattern), read) for pattern, read in (
    ('anthropic-ratelimit-unified-(.+)-utilization', unified_limit),
    ('anthropic-ratelimit-(?!unified)(.+)-remaining', plain_limit),
    ('x-ratelimit-remaining-(.+)', openai_limit), ('x-codex-(.+)-used-percent', codex_limit)))


def family_fields(headers: dict, now: float) -> dict:
    """Fields of windows of model families that last: other models' later answers lack them."""
    matches = filter(None, map(FAMILY_FIELD.fullmatch, headers))
    return {match.group(): headers[match.group()] for match in matches
            if parse_reset(headers.get(f'{UNIFIED}{match.group(1)}-reset'), now)}


WINDOW = re.compile(r'(\d+(?:\.\d+)?)([hd])(?:_.+)?')
#: Where less of a window has passed, or been used, its pace would be chance.
LEAST_SHARE = 0.03


def window_length_s(name: str) -> float | None:
    """Of '5h', '7d', '7d_opus' ...; None for what is no window of hours or days."""
    match = WINDOW.fullmatch(name)
    return float(match.group(1)) * (3600 if match.group(2) == 'h' else 86_400) if match else None


def window_pace(name: str, used: float, resets_s: float | None,
                now: float) -> tuple[float | None, float | None]:
    """(share that is used at the reset at this pace, unix seconds when all is used: None where
    it lasts); (None, None) where that says nothing, and for 5 hours that will last."""
    length_s = window_length_s(name) or 0
    passed = 1 - resets_s / length_s if length_s and resets_s else 0
    if min(passed, used) < LEAST_SHARE or used >= 1:
        return None, None
    if used > passed:
        return used / passed, now + (1 - used) / used * passed * length_s
    return (None if length_s <= 5 * 3600 else used / passed), None


def tells_limits(headers: dict) -> bool:
    return any(name.startswith(('anthropic-ratelimit-', 'x-ratelimit-', 'x-codex-'))
               for name in headers)


def rate_limit_fields(headers: dict) -> tuple:
    """((name, value), ...) of the fields from which Claude Code shows when a limit ends."""
    return tuple((name, value) for name, value in headers.items()
                 if name.startswith('anthropic-ratelimit-'))


def says(pattern):
    """A condition: the error's type or message matches, whatever its case."""
    found = re.compile(pattern, re.IGNORECASE).search
    return lambda answer: bool(found(answer.error_type) or found(answer.message))


#: How servers of all kinds say that they do not know a model.
NO_SUCH_MODEL = (
    r'model_not_found|no such model|not a valid model|no endpoints? found|no available channels?|'
    r'(invalid|unknown|unrecognized|unsupported) model|access to (the )?model|'
    r'models? (\S{1,120} )?(is |was |are |could )?(unknown|invalid|unavailable|not (supported|'
    r'found|available|deployed|enabled|recognized|exist|be found))|model .{0,80}(does not exist|'
    r'not found|not supported when using codex)|模型.{0,80}(不存在|无可用渠道)')


def extra_usage_ends_s(headers: dict, now: float) -> float:
    """Seconds for which answers like this one are paid beside the plan; 0 for one that is not."""
    is_paid = headers.get(UNIFIED + 'overage-in-use', '').strip().lower() == 'true' or (
        headers.get(UNIFIED + 'status') == 'rejected'
        and headers.get(UNIFIED + 'overage-status', '').startswith('allowed'))
    if not is_paid:
        return 0
    resets = [parse_reset(reset, now) for reset in (
        headers.get(UNIFIED + 'reset'), *rejected_windows(headers).values())]
    return max(filter(None, resets), default=300)


#: The policy, first match first.  A new status or wording is a row.
ANSWERED = Rule('answered', range(200, 400), Step.RELAY)
#: By a proxy, a company's gateway or a country's border, which know nothing of the key.
NETWORK_REFUSED = Rule('network_refused', (403,), Step.NEXT_KEY, Final.BLOCKED, scope=Scope.SERVER,
                       cooldown_s=15, strikes=3, asks_again=ANY_TIME, waits=False,
                       words='refused on the way there')
#: What only a person can mend: no request waits for it, and it is asked again in passing.
BY_A_PERSON = {'waits': False, 'asks_again': IN_PASSING, 'attention': True}
NO_MODEL = Rule('unknown_model', (404,), Step.NEXT_KEY, scope=Scope.PAIR, cooldown_s=3600,
                other_providers=False, waits=False, asks_again=IN_PASSING, words='no such model')
AUTH_FAILED = Rule('auth_failed', (401,), Step.NEXT_KEY, Final.UNAUTHORIZED, scope=Scope.KEY,
                   cooldown_s=300, doubles_to_s=3600, words='key is not accepted', **BY_A_PERSON)
BILLING = Rule('billing', (402,), Step.NEXT_KEY, scope=Scope.KEY, cooldown_s=3600,
               words='payment is required', **BY_A_PERSON)
RATE_LIMITED = Rule('rate_limited', (429,), Step.NEXT_KEY, Final.LIMITED, scope=Scope.PAIR,
                    cooldown_s=30, words='rate limit reached')
OVERLOADED = Rule('overloaded', (529,), Step.NEXT_KEY, Final.OVERLOADED, scope=Scope.PAIR,
                  cooldown_s=10, again=Again.ALONE, tries=2, words='model is overloaded')
SERVER_ERROR = Rule('server_error', (408, 500, *range(502, 600)), Step.NEXT_KEY,
                    Final.SERVER, scope=Scope.PAIR, cooldown_s=15, again=Again.FIRST, tries=3,
                    strikes=3, asks_again=ANY_TIME, words='server errors')
EXTRA_USAGE = Rule('extra_usage', (400, 403), Step.NEXT_KEY, scope=Scope.PAIR, cooldown_s=300,
                   when=says('extra usage'), waits=False, asks_again=IN_PASSING,
                   words='extra usage is used up')
RELAYED = Rule('relayed', (), Step.RELAY)
#: What one key does not know another may have made: only the last says so to the client.
ELSEWHERE = Rule('elsewhere', (404,), Step.RELAY, when=lambda answer: bool(made_id(answer.path)))
RULES = (
    ANSWERED,
    ELSEWHERE,
    Rule('no_credit', (400, 402, 403), Step.NEXT_KEY, scope=Scope.KEY, cooldown_s=3600,
         when=says('credit balance is too low'), words='credit balance is too low',
         **BY_A_PERSON),
    Rule('usage_limit', (400, 403), Step.NEXT_KEY, scope=Scope.KEY, cooldown_s=3600,
         when=says('reached your specified .{0,20}usage limits'), hint=seconds_to_regained_access,
         words='usage limit reached', **BY_A_PERSON),
    EXTRA_USAGE,
    Rule('disabled', (400, 403), Step.NEXT_KEY, Final.BLOCKED, scope=Scope.KEY, cooldown_s=3600,
         when=says('organization (has been|is) disabled|oauth .{0,80}not (allowed|supported)'
                   '.{0,80}organization|organization .{0,80}not .{0,80}oauth'),
         words='not allowed by its organization', **BY_A_PERSON),
    Rule('bad_thinking', (400,), Step.REPAIR,
         when=lambda answer: find_repair(answer.message, CONVERSATION_REPAIRS)),
    # Claude Code mends its own requests for the model that it asked for, by the wording.
    Rule('unsupported_field', (400,), Step.REPAIR, when=lambda answer: answer.is_fallback
         and find_repair(answer.message, MODEL_REPAIRS)),
    AUTH_FAILED,
    BILLING,
    NO_MODEL._replace(statuses=(400, 403, 404), other_providers=True,
                      when=lambda answer: answer.is_relays and says(NO_SUCH_MODEL)(answer)),
    Rule('forbidden', (403,), Step.NEXT_KEY, Final.BLOCKED, scope=Scope.PAIR, cooldown_s=600,
         when=says('permission_error'), words='access is not allowed', **BY_A_PERSON),
    NETWORK_REFUSED,
    NO_MODEL._replace(when=lambda answer: answer.model and (
        answer.model in answer.message or re.match(r'models?\b', answer.message))),
    Rule('other_limit', (429,), Step.NEXT_KEY, other_models=False,
         when=lambda answer: answer.path != MESSAGES_PATH),
    Rule('window_spent', (429,), Step.NEXT_KEY, Final.LIMITED, scope=Scope.KEY, cooldown_s=300,
         when=lambda answer: not KEY_WINDOWS.isdisjoint(rejected_windows(answer.headers)),
         hint=seconds_to_window_reset, asks_again=LATER, words='5-hour or 7-day limit reached'),
    Rule('family_window_spent', (429,), Step.NEXT_KEY, Final.LIMITED, scope=Scope.PAIR,
         cooldown_s=300, when=lambda answer: bool(rejected_windows(answer.headers)),
         hint=seconds_to_window_reset, asks_again=LATER,
         words='limit of this model family reached'),
    # Behind the windows: an account without credit says so in every answer.
    EXTRA_USAGE._replace(statuses=(429,), when=lambda answer: EXTRA_USAGE.when(answer)
                         or 'out_of_credits' in answer.headers.get(
                             UNIFIED + 'overage-disabled-reason', '')),
    Rule('spend_limit', (429,), Step.NEXT_KEY, Final.LIMITED, scope=Scope.KEY, cooldown_s=3600,
         when=says('enforced_spend_limit_reached'), words='spending limit reached',
         **BY_A_PERSON),
    RATE_LIMITED._replace(hint=seconds_to_limit_reset,
                          when=lambda answer: seconds_to_limit_reset(answer) is not None),
    Rule('request_limited', (429,), Step.NEXT_KEY, tries=2, other_models=False,
         when=lambda answer: 'retry-after' not in answer.headers
         and not rate_limit_fields(answer.headers)
         and answer.headers.get('x-should-retry', '').lower() == 'true'),
    RATE_LIMITED._replace(name='throttled', doubles_to_s=300),
    OVERLOADED,
    SERVER_ERROR,
    RELAYED,
)

DURATION = re.compile(r'(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?!s))?(?:([\d.]+)s)?(?:([\d.]+)ms)?')


def parse_duration(text):
    """Seconds in '6m0s', '350ms', '1h2m3.5s' or a bare number of seconds; None in others."""
    text = (text or '').strip()
    match = DURATION.fullmatch(text + 's' if re.fullmatch(r'[\d.]+', text) else text)
    if not text or not match:
        return None
    parts = zip(match.groups(), (86_400_000, 3_600_000, 60_000, 1000, 1))
    try:
        return sum(float(part) * unit_ms for part, unit_ms in parts if part) / 1000
    except ValueError:                # '1.2.3'
        return None


def seconds_to_openai_reset(answer):
    """From retry-after-ms or retry-after, else the longest reset of what has nothing left, else
    "try again in 41.7s" in the message."""
    headers, seconds = answer.headers, retry_after_s(answer)
    if seconds is not None:
        return seconds
    resets = [parse_duration(value) for name, value in headers.items()
              if name.startswith('x-ratelimit-reset-')
              and headers.get(name.replace('-reset-', '-remaining-'), '0').strip() == '0']
    match = re.search(r'(?:try again|retry) (?:in|after) ((?:[\d.]+ ?(?:ms|[dhms]))+)',
                      answer.message, re.IGNORECASE)
    resets.append(parse_duration(match.group(1).replace(' ', '')) if match else None)
    return max((s for s in map(sane_hint, resets) if s is not None), default=None)


def seconds_to_plan_reset(answer):
    """From a ChatGPT plan's `resets_in_seconds` or `resets_at`."""
    details = answer.details
    seconds = details.get('resets_in_seconds')
    if is_whole(seconds) and 0 <= seconds <= ABSURD_HINT_S:
        return seconds
    return parse_reset(str(details.get('resets_at')), answer.now)


#: How servers of all kinds say that the prompt alone is too long, and that nothing is paid for.
TOO_LONG = (
    r'context_length_exceeded|(maximum|the) context length|context.?window|prompt is too long|'
    r'exceeds? the (available|maximum) context|longer than the maximum model length|'
    r'(prompt|input)( token count| length)?( of)?[\d() ]* exceeds|inputs\W{1,3}must have less')
NO_MONEY = (r'insufficient_quota|billing_hard_limit_reached|spend_limit_exceeded|'
            r'insufficient balance|balance is insufficient|n.t have any credits')

#: The policy for OpenAI and compatible servers, first match first.
OPENAI_RULES = (
    ANSWERED._replace(statuses=range(200, 300)),
    NO_MODEL._replace(name='model_refused', statuses=(400, 403, 404), other_providers=True,
                      when=lambda answer: answer.status == 404 or says(NO_SUCH_MODEL)(answer)),
    Rule('unsupported_parameter', (400, 422), Step.REPAIR,
         when=lambda answer: find_openai_repair(answer.message)),
    Rule('context_too_long', (400, 413, 422), Step.RELAY, when=says(TOO_LONG)),
    NETWORK_REFUSED._replace(when=lambda answer: not answer.details or says(
        'request_forbidden|unsupported_country|request not allowed')(answer)),
    Rule('out_of_quota', (403, 429), Step.NEXT_KEY, Final.LIMITED, scope=Scope.KEY,
         cooldown_s=3600, when=says(NO_MONEY), words='quota is used up', **BY_A_PERSON),
    AUTH_FAILED._replace(statuses=(401, 403)),
    BILLING,
    Rule('plan_limit', (429,), Step.NEXT_KEY, Final.LIMITED, scope=Scope.KEY, cooldown_s=300,
         when=says('usage_limit_reached|usage_not_included'), hint=seconds_to_plan_reset,
         asks_again=LATER, words='plan limit reached'),
    RATE_LIMITED._replace(hint=seconds_to_openai_reset),
    OVERLOADED._replace(statuses=(498, 503, 529), doubles_to_s=30,
                        when=lambda answer: answer.status == 529 or says(
                            'overloaded|slow.down|at capacity|capacity.exceeded')(answer)),
    # llama-cpp-python's 400.
    Rule('rejected', (500,), Step.RELAY, when=says(r'\d validation errors?:')),
    SERVER_ERROR._replace(statuses=(408, *range(500, 600))),
    Rule('unreadable', range(300, 400), Step.NEXT_KEY, Final.SERVER),
    RELAYED,
)

#: What an attempt without an answer came to.
UNREACHABLE = Rule('unreachable', (), Step.NEXT_KEY, Final.SERVER, scope=Scope.SERVER,
                   cooldown_s=1, doubles_to_s=300, strikes=3, asks_again=ANY_TIME,
                   words='server is not reachable')
RESET = UNREACHABLE._replace(name='reset', words='connection was lost')
TIMED_OUT = Rule('timed_out', (), Step.STOP, Final.TIMEOUT)
NO_TOKEN = Rule('no_token', (), Step.NEXT_KEY, Final.UNAUTHORIZED, waits=False, attention=True)
#: llama-cpp-python reports its errors only where no stream is wanted.
EMPTY_STREAM = Rule('empty_stream', (), Step.NEXT_KEY, Final.SERVER, again=Again.FIRST)
#: A 200 that is empty, a page, or no message in any other way.
NO_MESSAGE = Rule('no_message', (), Step.NEXT_KEY, Final.SERVER, scope=Scope.PAIR, cooldown_s=15,
                  tries=3, strikes=3, asks_again=ANY_TIME, words='answers are no messages')
#: What broke after its commit: the client's own retry is to meet another key.
BROKE_OFF = Rule('broke_off', (), Step.NEXT_KEY, Final.SERVER, scope=Scope.PAIR, cooldown_s=10,
                 asks_again=ANY_TIME, words='answer broke off')


def find_cooling_rule(provider: str, name: str) -> Rule | None:
    """The rule of this name by which a provider's keys cool; None where this version has none."""
    rules = RULES if provider == ANTHROPIC else OPENAI_RULES
    return next((rule for rule in (*rules, UNREACHABLE, RESET, NO_MESSAGE, BROKE_OFF)
                 if rule.name == name and rule.scope), None)


UNTRANSLATABLE = Rule('untranslatable', (), Step.NEXT_KEY, waits=False)
#: A model or provider that was not asked for refuses the request: another may take it.  A client
#: that heard of it would compact what the asked model holds.
UNFIT = Rule('unfit', (), Step.NEXT_KEY, tries=1, waits=False)

#: The status behind an error's type, in `error` events and in our own errors (docs: errors).
STATUS_OF_ERROR = {
    'invalid_request_error': 400, 'authentication_error': 401, 'billing_error': 402,
    'permission_error': 403, 'not_found_error': 404, 'request_too_large': 413,
    'rate_limit_error': 429, 'timeout_error': 504, 'overloaded_error': 529}
#: The status behind OpenAI's error codes and types in the events of a stream.
STATUS_OF_OPENAI_ERROR = {
    **dict.fromkeys(('context_length_exceeded', 'invalid_prompt', 'cyber_policy', 'bio_policy',
                     'invalid_request_error', 'invalid_value'), 400),
    'authentication_error': 401, 'invalid_api_key': 401, 'permission_error': 403,
    'model_not_found': 404,
    **dict.fromkeys(('rate_limit_exceeded', 'rate_limit_error', 'tokens', 'requests',
                     'insufficient_quota', 'usage_limit_reached', 'usage_not_included',
                     'billing_hard_limit_reached'), 429),
    'server_is_overloaded': 529, 'slow_down': 529, 'overloaded_error': 529}


def error_status(details: dict) -> int:
    """The HTTP status that an OpenAI error inside a stream stands for."""
    for name in map(str, (details.get('code'), details.get('type'))):
        if re.fullmatch('[45][0-9][0-9]', name):      # OpenRouter puts the status there
            return int(name)
        if name in STATUS_OF_OPENAI_ERROR:
            return STATUS_OF_OPENAI_ERROR[name]
        if name.endswith('spend_limit_exceeded'):
            return 429
        if name.startswith('image_'):
            return 400
    return 529 if 'at capacity' in str(details.get('message')) else 500


def error_type(status: int) -> str:
    """Anthropic's error type for a status."""
    types = {status: type for type, status in STATUS_OF_ERROR.items()}
    return types.get(status, 'api_error' if status >= 500 else 'invalid_request_error')


def classify(answer: Answer, rules: tuple = RULES) -> Outcome:
    """The Outcome of an Answer, by the first rule that fits; the last fits all."""
    rule, found = next((rule, found) for rule in rules
                       if not rule.statuses or answer.status in rule.statuses
                       if (found := rule.when(answer)))
    repair = found if rule.step is Step.REPAIR else None
    hint_s = ends_s = rule.hint(answer)
    if ends_s is not None:            # it may be asked sooner, though the limit goes on
        soonest_s = retry_after_s(answer)
        hint_s = ends_s if soonest_s is None else min(ends_s, soonest_s)
    return Outcome(rule, answer.status, redact(answer.message), hint_s, repair, ends_s)


class ErrorText(NamedTuple):
    """What an error body says, cut short: the search for patterns holds up other threads."""
    type: str                 # with the code behind it, where there is one
    message: str
    details: dict = {}        # the `error` object itself


NO_ERROR = ErrorText('', '')


def read_error(body: bytes | bytearray) -> ErrorText:
    """The ErrorText of an error body: an `error` object, a bare `message` (vLLM), an `error` that
    is a text (Ollama), `detail`, a text or a list (Codex, FastAPI), else its beginning."""
    document = object_or_none(body)
    if document is None:
        return ErrorText('', page_text(body))
    error = document.get('error', document.get('detail', document))
    if isinstance(error, list):
        error = '; '.join(describe_complaint(as_dict(entry)) for entry in error)
    if isinstance(error, str):
        return ErrorText('', error[:MAX_MESSAGE_CHARS], {'message': error[:MAX_MESSAGE_CHARS]})
    return describe_error(as_dict(error), body)


TAGS = re.compile(r'<(?:script|style).*?</(?:script|style)>|<[^>]*>', re.DOTALL | re.IGNORECASE)


def page_text(body):
    """What a body that is no JSON says: of a page its words, for Claude Code shows no markup."""
    text = bytes(body[:MAX_MESSAGE_CHARS]).decode('utf-8', 'replace')
    text = TAGS.sub(' ', text) if text.lstrip()[:1] == '<' else text
    return printable(' '.join(text.split()))[:200]


def body_start(body):
    return printable(bytes(body[:200]).decode('utf-8', 'replace'))


def describe_error(error: dict, body: bytes | bytearray = b'') -> ErrorText:
    """The ErrorText of an `error` object."""
    code = as_dict(error.get('details')).get('error_code') or error.get('code')
    type = f'{error.get("type") or ""} {code or ""}'.strip()
    message = error.get('message')
    message = body_start(body) if message is None else str(message)[:MAX_MESSAGE_CHARS]
    parameter = text_or_none(error.get('param'))
    if parameter and parameter not in message:        # OpenAI's; its message is vague without
        message += f' (parameter {parameter[:100]})'
    return ErrorText(type[:MAX_MESSAGE_CHARS], message, error)


def describe_complaint(entry):
    """'top_k: Extra inputs are not permitted', of one entry of FastAPI's `detail`."""
    place = '.'.join(str(part) for part in as_list(entry.get('loc')) if part != 'body')
    return f'{place}: {entry.get("msg")}'


# ==============================================================================
# Event streams
# ==============================================================================
# A stream is passed on in whole events, unchanged, so that a cut never leaves half an event
# with the client.  Format: https://html.spec.whatwg.org/multipage/server-sent-events.html

HELD_BACK = ('message_start', 'ping')
DATA_LINE = re.compile(rb'^data: ?(.*)', re.MULTILINE)
ERROR_LINE = re.compile(rb'^event: ?error$', re.MULTILINE)


def with_lf(data):
    """Bytes with LF for the other two line ends of event streams."""
    return data.replace(b'\r\n', b'\n').replace(b'\r', b'\n') if b'\r' in data else data


def event_bytes(event: dict) -> bytes:
    """One event as it goes over the wire; `event` is its data, with its `type`."""
    return f'event: {event["type"]}\ndata: {json.dumps(event)}\n\n'.encode()


def error_event(type: str, message: str) -> bytes:
    return event_bytes({'type': 'error', 'error': {'type': type, 'message': message}})


PING_EVENT = event_bytes({'type': 'ping'})


def status_of_error(error: dict) -> int:
    """The HTTP status behind an `error` object in a 200, of OpenAI's codes too."""
    return STATUS_OF_ERROR.get(str(error.get('type'))) or error_status(error)


def error_object(error):
    """An error as an object: some servers send its text alone."""
    return error if isinstance(error, dict) else {'message': str(error)}


class EventStream:
    """What a client of /v1/messages gets of an upstream's stream, and what was said in it."""

    feed: Callable[[bytes], bytes]    # (data): what to pass on, whole events or b''
    last: Callable[..., bytes]        # (is_cut): what remains at the end, or where it broke off
    _status_of = staticmethod(status_of_error)
    # How streams differ:
    sends_pings = True            # while its model thinks, so that a client keeps waiting
    can_be_carried = True         # what `feed` does is short
    can_be_asked_whole = False    # an upstream whose stream is empty may answer without one

    def __init__(self):
        self.has_begun = False    # message_start came
        self.opened_by: str | None = None     # the type of the first event beyond a greeting
        self.failure: dict | None = None      # the upstream's `error` object, which ended it
        self.stopped = False      # message_stop came
        self.stop_reason = None
        self.is_over = False      # what still comes would be no part of the message
        self.usage = {}           # {'input_tokens': 10, 'output_tokens': 20, ...}, latest wins
        self.dropped_calls = 0    # for want of a name

    @property
    def failure_status(self) -> int:
        """The HTTP status that the failure stands for."""
        return self._status_of(self.failure or {})


class MessageStream(EventStream):
    """Cuts a stream of the Messages API into whole events, which go on until its body ends."""

    def __init__(self):
        super().__init__()
        self._tail = bytearray()  # the beginning of an event that is not whole yet

    def feed(self, data):
        """The whole events among the bytes so far, b'' when there is none yet."""
        searched = max(0, len(self._tail) - 3)    # only what is new: it may come byte by byte
        if self._tail:
            self._tail += data
            data = self._tail
        lf, crlf = data.rfind(b'\n\n', searched), data.rfind(b'\r\n\r\n', searched)
        end = max(lf + 2 if lf >= 0 else 0, crlf + 4 if crlf >= 0 else 0)
        if not end and len(data) <= MAX_EVENT_BYTES:
            self._tail = self._tail or bytearray(data)
            return b''
        end = end or len(data)
        events, self._tail = bytes(data[:end]), bytearray(data[end:])
        if self._matters(events):
            for event in filter(self._matters, with_lf(events).split(b'\n\n')):
                self._note(event)
        return events

    def _matters(self, data):
        """Whether it is to be read: text deltas, nearly all of a stream, need not be."""
        return (not self.opened_by or b'message_delta' in data or b'message_stop' in data
                or b'error' in data)

    def last(self, is_cut=False):
        """The last event of a stream that ended without the blank line after it."""
        tail, self._tail = bytes(self._tail), bytearray()
        return tail + b'\n\n' if not is_cut and self._note(with_lf(tail)) else b''

    def _note(self, lines):
        """Remembers what matters of one event; whether it was one, with a JSON object."""
        found = DATA_LINE.findall(lines)
        data = b'\n'.join(found)
        is_error = bool(found) and ERROR_LINE.search(lines) is not None
        event = object_or_none(data)
        if event is None:             # a comment, or no JSON: passed on all the same
            if not is_error:
                return False
            event = {'error': data.decode('utf-8', 'replace').strip()}
        type = event.get('type')
        if is_error or type is None and event.get('error'):
            type = 'error'
        if type not in HELD_BACK:
            self.opened_by = self.opened_by or str(type)
        if type == 'error':
            self.failure = error_object(event.get('error', event))
        elif type == 'message_stop':
            self.stopped = True
        elif type == 'message_start':
            self.has_begun = True
            self._note_usage(as_dict(event.get('message')).get('usage'))
        elif type == 'message_delta':
            self.stop_reason = as_dict(event.get('delta')).get('stop_reason') or self.stop_reason
            self._note_usage(event.get('usage'))
        return True

    def _note_usage(self, usage):
        self.usage.update({k: v for k, v in as_dict(usage).items() if is_whole(v)})


# ==============================================================================
# Request translation
# ==============================================================================
# A Messages request in OpenAI's two wire formats.  It is read once, into turns; both formats
# are written from those, so that what must hold for both (which result follows which call)
# is decided in one place.  Only what is named here goes out: OpenAI refuses what it does not
# know.  What cannot be carried is noted; what would change the meaning is refused.

class Untranslatable(BadRequest):
    """A request that an OpenAI model would take for another one."""


class Text(NamedTuple):
    text: str


class Media(NamedTuple):
    """An image or a document."""
    kind: str                 # 'image' or 'file'
    url: str                  # https: or data:
    name: str = ''


class ToolCall(NamedTuple):
    id: str
    name: str
    arguments: str            # a JSON object


class Reasoning(NamedTuple):
    """What an OpenAI model thought, as it may be given back to it."""
    payload: str


class ToolResult(NamedTuple):
    """What a call came to."""
    call: ToolCall
    parts: list               # [Text or Media, ...]


class Turn(NamedTuple):
    role: str                 # 'system', 'user', 'assistant', 'results'
    parts: list


class Tool(NamedTuple):
    name: str
    description: str
    schema: dict
    is_strict: bool


class Notes:
    """What was left out of a request: `left_out` changes what the model sees."""

    def __init__(self):
        self.left_out = {}        # what -> True, in order

    def leave_out(self, what):
        self.left_out[what[:100]] = True


class Conversation(NamedTuple):
    """A Messages request, read."""
    body: dict
    system: str
    turns: list
    tools: list               # [Tool, ...]
    web_search: dict | None   # the server tool of that name
    names: dict[str, str]     # a tool's name as OpenAI takes it -> its name
    notes: Notes


# -- names and ids -------------------------------------------------------------

OPENAI_SAFE = re.compile(r'[A-Za-z0-9_-]+')
UNSAFE = re.compile(r'[^A-Za-z0-9_-]')


def sha256_of(text):
    return hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()


def shortened(text, limit, digest_chars=16):
    """`text` where OpenAI takes it, else its beginning and hash, so that equals stay equal."""
    if len(text) <= limit and OPENAI_SAFE.fullmatch(text):
        return text
    begun = UNSAFE.sub('_', text)[:limit - 1 - digest_chars]
    return f'{begun}_{sha256_of(text)[:digest_chars]}'


def short_name(name):
    return shortened(name, 64, 8)


# -- reading -------------------------------------------------------------------

def read_conversation(body: dict) -> Conversation:
    """The Conversation in a Messages request.  Raises Untranslatable."""
    if not text_or_none(body.get('model')):
        raise Untranslatable('model: Field required')
    if not as_list(body.get('messages')):
        raise Untranslatable('messages: at least one message is required')
    notes = Notes()
    tools, web_search = read_tools(body, notes)
    turns = read_turns(body['messages'], notes)
    if not any(turn.role in ('user', 'results', 'assistant') for turn in turns):
        raise Untranslatable('messages: at least one message must have content')
    if as_list(body.get('mcp_servers')):
        notes.leave_out('mcp_servers')
    calls = [part.name for turn in turns for part in turn.parts if isinstance(part, ToolCall)]
    names = {short_name(name): name for name in [*(tool.name for tool in tools), *calls]}
    return Conversation(body, read_system(body.get('system')), turns, tools, web_search, names,
                        notes)


def read_system(system):
    """The system prompt as one text.  Claude Code's billing line differs from request to
    request, which would make every prompt cache miss."""
    texts = [block_text(block) for block in as_blocks(system)]
    return '\n\n'.join(text for text in texts
                       if text and not text.startswith('x-anthropic-billing-header:'))


def as_blocks(content):
    """Content as a list of blocks: a text is one block."""
    if isinstance(content, str):
        return [{'type': 'text', 'text': content}]
    return [as_dict(block) for block in as_list(content)]


def block_text(block):
    return block['text'] if isinstance(block.get('text'), str) else ''


def read_turns(messages, notes):
    """[Turn, ...]: the results of an assistant's calls follow it at once, in the order of the
    calls, each exactly once; what else the user said follows them."""
    turns, calls, delayed = [], [], []
    for role, blocks in merge_roles(messages):
        parts = [part for block in blocks for part in read_block(block, notes)]
        if role == 'system' and calls:    # nothing may come between a call and its result
            delayed += [part for part in parts if isinstance(part, Text)]
            continue
        if calls or role == 'user':
            results, parts = pair_results(calls, parts)
            turns.append(Turn('results', results))
        parts = [part for part in parts if isinstance(part, PARTS_OF_ROLE[role])]
        turns += [Turn('system', delayed), Turn(role, parts)]
        delayed, calls = [], [part for part in parts if isinstance(part, ToolCall)]
    turns += [Turn('results', pair_results(calls, [])[0]), Turn('system', delayed)]
    return [turn for turn in turns if turn.parts]


PARTS_OF_ROLE = {'system': Text, 'user': (Text, Media), 'assistant': (Text, ToolCall, Reasoning)}


def merge_roles(messages):
    """[(role, blocks), ...]: neighbours of one role are one turn to Anthropic."""
    merged = []
    for message in map(as_dict, messages):
        role = message.get('role')
        if role not in tuple(PARTS_OF_ROLE):
            raise Untranslatable(f'messages: the role {printable(role)[:40]!r} is unknown')
        blocks = as_blocks(message.get('content'))
        if role == 'user' and [role for role, _ in merged[-2:]] == ['user', 'system'] and any(
                block.get('type') == 'tool_result' for block in blocks):
            merged[-2][1].extend(blocks)      # results that a system message parted
        elif merged and merged[-1][0] == role:
            merged[-1][1].extend(blocks)
        else:
            merged.append((role, blocks))
    return merged


NO_RESULT = '[no result: the tool call was interrupted]'


class LooseResult(NamedTuple):
    """A tool_result that has not met its call yet."""
    call_id: str
    parts: list


def pair_results(calls, parts):
    """([ToolResult, ...] for these calls, the other parts).  A result without a call becomes
    text; of two for one call the first counts."""
    found, others = {}, []
    wanted = {call.id for call in calls}
    for part in parts:
        if not isinstance(part, LooseResult):
            others.append(part)
        elif part.call_id not in wanted:
            others += [Text(f'[result of an earlier tool call {part.call_id}]'), *part.parts]
        else:
            found.setdefault(part.call_id, part.parts)
    return [ToolResult(call, found.get(call.id) or [Text(NO_RESULT)]) for call in calls], others


def read_block(block, notes):
    """[part, ...] of one content block."""
    type = printable(block.get('type'))[:60]
    if type in BLOCKS:
        return BLOCKS[type](block, notes)
    if type.endswith(('_tool_result', '_toolset_result')):
        return read_server_result(block, notes)
    notes.leave_out(f'{type} block')
    return [Text(f'[{type} omitted]')]


def source_url(source):
    """The https: or data: URL of an image or document; None of one that has neither."""
    if source.get('type') == 'base64':
        return f'data:{source.get("media_type")};base64,{source.get("data")}'
    return str(source.get('url')) if source.get('type') == 'url' else None


def read_image(block, notes):
    source = as_dict(block.get('source'))
    if (url := source_url(source)) is not None:
        return [Media('image', url)]
    notes.leave_out('image file')
    return [Text(f'[image omitted: {printable(source.get("file_id"))[:80]}]')]


def read_document(block, notes):
    source, title = as_dict(block.get('source')), str(block.get('title') or '')
    url, heading = source_url(source), [Text(title)] if title else []
    if url is not None:
        return [Media('file', url, title or 'document.pdf')]
    if source.get('type') == 'text':
        return [*heading, Text(str(source.get('data')))]
    if source.get('type') == 'content':
        inner = (read_block(inner, notes) for inner in as_blocks(source.get('content')))
        return [*heading, *itertools.chain.from_iterable(inner)]
    notes.leave_out('document file')
    return [Text(f'[document omitted: {title or printable(source.get("file_id"))[:80]}]')]


def read_search_result(block, notes):
    texts = [block_text(inner) for inner in as_blocks(block.get('content'))]
    return [Text('\n'.join([f'{block.get("title")} ({block.get("source")})', *texts]))]


def read_call(block, notes):
    arguments = block.get('input')
    arguments = dump_body(arguments).decode() if isinstance(arguments, dict) else '{}'
    return [ToolCall(str(block.get('id')), str(block.get('name')), arguments)]


def read_thinking(block, notes):
    """Thinking goes back only to the provider that it came from, and only sealed."""
    seal = str(block.get('signature' if block.get('type') == 'thinking' else 'data') or '')
    return [Reasoning(seal[len(PAYLOAD):])] if seal.startswith(PAYLOAD) else []


def read_result(block, notes):
    parts = [part for part in read_result_content(block.get('content'), notes)
             if isinstance(part, (Text, Media))] or [Text('(no output)')]
    if block.get('is_error') is True:
        parts = [Text('[tool error]'), *parts]
    return [LooseResult(str(block.get('tool_use_id')), parts)]


def read_result_content(content, notes):
    if isinstance(content, dict):
        return [Text(dump_body(content).decode())]
    blocks = as_blocks(content)
    loaded = [str(block.get('tool_name')) for block in blocks
              if block.get('type') == 'tool_reference']
    if loaded and len(loaded) == len(blocks):
        return [Text(f'Tool loaded: {", ".join(loaded)}')]
    return [part for block in blocks for part in read_block(block, notes)]


def read_server_result(block, notes):
    """Results of Anthropic's own tools: their titles and addresses."""
    lines = [' '.join(str(entry[name]) for name in ('title', 'url') if entry.get(name))
             for entry in map(as_dict, as_list(block.get('content')))]
    return [Text('\n'.join(filter(None, lines)) + '\n')] if any(lines) else []


BLOCKS = {
    'text': lambda block, notes: [Text(text) for text in [block_text(block)] if text],
    'image': read_image, 'document': read_document,
    'search_result': read_search_result, 'tool_use': read_call, 'tool_result': read_result,
    'thinking': read_thinking, 'redacted_thinking': read_thinking,
    'mcp_tool_result': lambda block, notes: read_result_content(block.get('content'), notes),
    # A call of Anthropic's own tools has no equivalent; its result says what matters.
    'server_tool_use': lambda block, notes: [], 'mcp_tool_use': lambda block, notes: [],
}


# -- tools ---------------------------------------------------------------------

#: Claude Code's stand-in for tools that are not loaded yet; its text forbids to call it.
PLACEHOLDER_TOOL = 'DeferredToolPlaceholder'
#: What Anthropic's models know by type and clients carry out, in words that others need.
TYPED_TOOLS = {
    'bash_': ('Run a command in a bash shell that keeps its state between calls.', {
        'command': {'type': 'string', 'description': 'the command to run'},
        'restart': {'type': 'boolean', 'description': 'true restarts the shell'}}, []),
    'text_editor_': ('View, create and edit text files.', {
        'command': {'type': 'string', 'enum': ['view', 'create', 'str_replace', 'insert']},
        'path': {'type': 'string'},
        'view_range': {'type': 'array', 'items': {'type': 'integer'},
                       'description': 'view: first and last line'},
        'file_text': {'type': 'string', 'description': 'create: the content'},
        'old_str': {'type': 'string', 'description': 'str_replace: must occur once'},
        'new_str': {'type': 'string', 'description': 'str_replace, insert: the new text'},
        'insert_line': {'type': 'integer', 'description': 'insert: after this line'},
        'insert_text': {'type': 'string', 'description': 'insert: the text'},
    }, ['command', 'path']),
}


def read_tools(body, notes):
    """([Tool, ...], the web_search tool or None)."""
    tools, web_search = [], None
    for entry in map(as_dict, as_list(body.get('tools'))):
        type, name = str(entry.get('type') or 'custom'), str(entry.get('name'))
        typed = next((row for prefix, row in TYPED_TOOLS.items() if type.startswith(prefix)), None)
        if name == PLACEHOLDER_TOOL:
            continue
        if type == 'custom':
            tools.append(Tool(name, str(entry.get('description') or ''),
                              clean_root_schema(entry.get('input_schema'), notes),
                              entry.get('strict') is True))
        elif typed:
            schema = {'type': 'object', 'properties': typed[1], 'required': typed[2]}
            tools.append(Tool(name, typed[0], schema, False))
        elif type.startswith('web_search_'):
            web_search = entry
        else:
            notes.leave_out(f'tool {type}')
    return tools, web_search


SCHEMA_LISTS = ('anyOf', 'oneOf', 'allOf', 'prefixItems')
SCHEMA_MAPS = ('properties', 'patternProperties', '$defs', 'definitions', 'dependentSchemas')
SCHEMAS = ('items', 'additionalProperties', 'not', 'if', 'then', 'else', 'contains')


def edit_schemas(name, value, edit):
    """What stands under a keyword of a schema, with the schemas in it edited.  Only places that
    hold schemas are walked: a property may well be called "format"."""
    if name in SCHEMA_MAPS and isinstance(value, dict):
        return {key: edit(inner) for key, inner in value.items()}
    if name in SCHEMA_LISTS and isinstance(value, list):
        return list(map(edit, value))
    return edit(value) if name in SCHEMAS else value


def clean_schema(schema):
    """A JSON schema that OpenAI takes and that means the same: arrays say what they hold,
    objects list their properties; `$schema` and the format `uri` go."""
    if not isinstance(schema, dict):
        return schema
    cleaned = {name: edit_schemas(name, value, clean_schema) for name, value in schema.items()
               if name != '$schema' and (name, value) != ('format', 'uri')}
    types = schema.get('type')
    types = types if isinstance(types, list) else [types]
    if 'object' in types and not cleaned.get('additionalProperties'):
        cleaned.setdefault('properties', {})
    if 'array' in types:
        cleaned.setdefault('items', {})
    return cleaned


def clean_root_schema(schema, notes):
    """The same for a tool's input, which has to be an object without alternatives."""
    schema = {'type': 'object', 'properties': {}, **clean_schema(as_dict(schema))}
    alternatives = [name for name in ('anyOf', 'oneOf', 'allOf', 'enum', 'not') if name in schema]
    if not alternatives and schema['type'] == 'object':
        return schema
    notes.leave_out("alternatives in a tool's input_schema")
    properties = as_dict(schema['properties'])
    for name in alternatives:
        for branch in map(as_dict, as_list(schema[name])):
            path = str(branch.get('$ref')).split('/')
            if path[0] == '#' and len(path) == 3:     # into the root's own definitions
                branch = as_dict(as_dict(schema.get(path[1])).get(path[2]))
            properties = {**as_dict(branch.get('properties')), **properties}
    required = [schema, *map(as_dict, as_list(schema.get('allOf')))]
    names = [name for part in required for name in as_list(part.get('required'))]
    kept = {name: value for name, value in schema.items() if name not in alternatives}
    return {**kept, 'type': 'object', 'properties': properties,
            'required': [name for name in properties if name in names]}


def meets_strict_rules(schema):
    """Whether OpenAI may enforce a schema: every object requires its properties and no others."""
    if isinstance(schema, list):
        return all(map(meets_strict_rules, schema))
    if not isinstance(schema, dict):
        return True
    if schema.get('type') == 'object' or 'properties' in schema:
        names = set(map(str, as_list(schema.get('required'))))
        if schema.get('additionalProperties') is not False or names != set(
                as_dict(schema.get('properties'))):
            return False
    inner = [schema.get(name) for name in (*SCHEMA_LISTS, *SCHEMAS)]
    inner += [list(as_dict(schema.get(name)).values()) for name in SCHEMA_MAPS]
    return all(map(meets_strict_rules, inner))


def read_tool_choice(conversation):
    """(mode or None, tool name or None).  Raises Untranslatable for a tool that there is not."""
    choice = as_dict(conversation.body.get('tool_choice'))
    type, name = choice.get('type'), choice.get('name')
    if type != 'tool':
        return (type if type in ('auto', 'any', 'none') else None), None
    if any(tool.name == name for tool in conversation.tools):
        return 'tool', name
    if any(as_dict(tool).get('name') == name for tool in as_list(conversation.body.get('tools'))):
        is_search = as_dict(conversation.web_search).get('name') == name
        return ('web_search' if is_search else None), name
    raise Untranslatable(f'tool_choice: there is no tool {printable(name)[:80]!r}')


# -- what a model takes --------------------------------------------------------

class ModelLimits(NamedTuple):
    """What OpenAI's own models accept on Chat Completions; a first guess for others of such a
    name.  A 400 corrects it (OPENAI_REPAIRS)."""
    pattern: str                       # of the beginning of a model's name
    max_output_tokens: int | None = None
    efforts: tuple = ()                # accepted values of reasoning_effort; (): never
    effort_with_tools: str = 'kept'    # or 'omitted', or the only value there is
    sampling: str = 'always'           # 'never', 'without effort', 'with none'
    takes_stop: bool = True
    takes_files: bool = True


LOW_TO_HIGH = ('low', 'medium', 'high')
MODEL_LIMITS = (
    ModelLimits(r'o\d', 100_000, LOW_TO_HIGH, sampling='never', takes_stop=False),
    ModelLimits(r'gpt-5.*chat', 16_384),
    ModelLimits(r'gpt-5(?![.\d])', 128_000, ('minimal', *LOW_TO_HIGH), sampling='never',
                takes_stop=False),
    ModelLimits(r'gpt-5\.1(?!\d)', 128_000, ('none', *LOW_TO_HIGH), sampling='without effort',
                takes_stop=False),
    ModelLimits(r'gpt-5\.[234](?!\d)', 128_000, ('none', *LOW_TO_HIGH, 'xhigh'), 'omitted',
                'without effort', takes_stop=False),
    ModelLimits(r'gpt-5\.', 128_000, ('none', *LOW_TO_HIGH, 'xhigh', 'max'), 'none', 'with none'),
    ModelLimits(r'gpt-4\.1', 32_768),
    ModelLimits(r'gpt-4o|chatgpt-4o', 16_384),
    ModelLimits('', takes_files=False),
)
MAX_TOOLS = 128
MAX_STOPS = 4
#: Responses refuses a smaller max_output_tokens.
LEAST_OUTPUT_TOKENS = 16
#: Budgets of thinking tokens, as Claude Code's three words for it have them.
EFFORT_OF_BUDGET = ((2048, 'low'), (12_000, 'medium'), (math.inf, 'high'))
THINKING_IS_ON = ('enabled', 'adaptive', 'between_tools')


def find_limits(model):
    """The ModelLimits of a model, whichever vendor's prefix stands before it."""
    name = model.rpartition('/')[2]
    return next(limits for limits in MODEL_LIMITS if re.match(limits.pattern, name))


def wanted_effort(body):
    """The reasoning effort that a Messages request asks for; None where it leaves it open."""
    thinking = as_dict(body.get('thinking'))
    effort = as_dict(body.get('output_config')).get('effort')
    if thinking.get('type') == 'disabled':
        return None
    if effort in EFFORTS:
        return effort
    budget = thinking.get('budget_tokens', math.nan)
    if thinking.get('type') == 'enabled' and is_whole(budget):
        return next(effort for limit, effort in EFFORT_OF_BUDGET if budget <= limit)
    return 'medium' if thinking.get('type') in THINKING_IS_ON else None


def wants_thinking(body):
    """Whether the client asked for the text of the thinking, or for its blocks at all."""
    thinking = as_dict(body.get('thinking'))
    is_on = thinking.get('type') in THINKING_IS_ON
    return is_on and thinking.get('display') != 'omitted', is_on


def wanted_stops(body):
    return [stop for stop in as_list(body.get('stop_sequences')) if text_or_none(stop)]


def stop_fields(body, limits):
    """The stop sequences for Chat Completions; {} also where MessageEvents watches for them."""
    stops = wanted_stops(body)
    return {'stop': stops} if stops and limits.takes_stop and len(stops) <= MAX_STOPS else {}


def json_schema_format(body):
    """{'name', 'schema', 'strict'} of a wanted structured output, or None."""
    wanted = as_dict(as_dict(body.get('output_config')).get('format') or body.get('output_format'))
    schema = wanted.get('schema')
    if wanted.get('type') != 'json_schema' or not isinstance(schema, dict):
        return None
    return {'name': short_name(str(wanted.get('name') or 'answer')), 'schema': schema,
            'strict': meets_strict_rules(schema)}


def user_id_of(body):
    return text_or_none(as_dict(body.get('metadata')).get('user_id'))


def cache_key(body: dict) -> str | None:
    """A name for this conversation, for OpenAI's prompt cache: the session in Claude Code's
    user_id, else a hash of the user_id; None without one."""
    if not (user_id := user_id_of(body)):
        return None
    session = as_dict(object_or_none(user_id)).get('session_id')      # others' ids are no JSON
    if isinstance(session, str) and OPENAI_SAFE.fullmatch(session[:65]):
        return session[:64]
    return sha256_of(user_id)


class RequestWriter:
    """What the writers of both wire formats know and share."""

    write: Callable[[], dict]         # the request's body

    def __init__(self, conversation, target):
        self._conversation, self._target, self._body = conversation, target, conversation.body
        self._limits = find_limits(target.model)

    def _turns(self):
        """[message or item, ...] of the whole conversation, by _user_turn and the like."""
        return [item for turn in self._conversation.turns
                for item in getattr(self, f'_{turn.role}_turn')(turn.parts)]

    def _output_limit(self):
        """The wanted output tokens as far as the model gives them; None where none are named."""
        wanted = self._body.get('max_tokens')
        if not is_whole(wanted):
            return None
        return max(1, min(wanted, self._limits.max_output_tokens or wanted))

    def _effort(self):
        """The wanted reasoning effort, or the nearest that the model has; None for neither."""
        wanted = wanted_effort(self._body)
        return nearest_effort(wanted, self._limits.efforts) if wanted else None

    def _sampling_fields(self, effort):
        takes = {'always': True, 'never': False, 'without effort': effort in (None, 'none'),
                 'with none': effort == 'none'}[self._limits.sampling]
        return {name: self._body[name] for name in ('temperature', 'top_p')
                if takes and self._body.get(name) is not None}


# -- Chat Completions ----------------------------------------------------------

MAX_CHAT_ID_CHARS = 40


class ChatWriter(RequestWriter):
    """Writes a Chat Completions request (platform.openai.com/docs/api-reference/chat)."""

    def write(self):
        body, target = self._body, self._target
        system = self._conversation.system
        messages = [{'role': 'system', 'content': system}] if system else []
        out = {'model': target.model, 'messages': messages + self._turns()}
        if (limit := self._output_limit()) is not None:
            # Older servers ignore the new name, and write on and on.
            is_new = target.is_openai or self._limits.pattern
            out['max_completion_tokens' if is_new else 'max_tokens'] = limit
        if body.get('stream') is True:
            out.update(stream=True, stream_options={'include_usage': True})
        out.update(self._tool_fields())
        if effort := self._effort_beside(has_tools='tools' in out):
            out['reasoning_effort'] = effort
        out.update(self._sampling_fields(effort))
        out.update(stop_fields(body, self._limits))
        if schema := json_schema_format(body):
            out['response_format'] = {'type': 'json_schema', 'json_schema': schema}
        user_id = user_id_of(body)
        if target.is_openai and user_id:
            out.update(prompt_cache_key=cache_key(body), safety_identifier=sha256_of(user_id))
        return out

    def _effort_beside(self, has_tools):
        wanted = self._limits.effort_with_tools
        if has_tools and wanted != 'kept' and self._limits.efforts:
            return None if wanted == 'omitted' else wanted
        return self._effort()

    def _tool_fields(self):
        tools, notes = self._conversation.tools, self._conversation.notes
        if self._conversation.web_search:
            notes.leave_out('tool web_search')
        if len(tools) > MAX_TOOLS:
            notes.leave_out(f'tools beyond {MAX_TOOLS}')
        mode, name = read_tool_choice(self._conversation)
        if not tools:
            return {}
        chosen_first = sorted(tools, key=lambda tool: tool.name != name)
        fields: dict = {'tools': list(map(self._tool, chosen_first[:MAX_TOOLS]))}
        if mode == 'tool':
            fields['tool_choice'] = {'type': 'function', 'function': {'name': short_name(name)}}
        elif mode in TOOL_MODES:
            fields['tool_choice'] = TOOL_MODES[mode]
        if as_dict(self._body.get('tool_choice')).get('disable_parallel_tool_use') is True:
            fields['parallel_tool_calls'] = False
        return fields

    def _tool(self, tool):
        function = {'name': short_name(tool.name), 'parameters': tool.schema}
        if tool.description:
            function['description'] = tool.description
        if tool.is_strict and meets_strict_rules(tool.schema):
            function['strict'] = True
        return {'type': 'function', 'function': function}

    def _system_turn(self, parts):
        return [{'role': 'system', 'content': joined_text(parts)}]

    def _user_turn(self, parts):
        """A plain text where there is only text: not every server takes parts."""
        is_text = all(isinstance(part, Text) for part in parts)
        content = joined_text(parts) if is_text else list(map(self._part, parts))
        return [{'role': 'user', 'content': content}]

    def _assistant_turn(self, parts):
        text = ''.join(part.text for part in parts if isinstance(part, Text))
        calls = [{'id': shortened(part.id, MAX_CHAT_ID_CHARS), 'type': 'function',
                  'function': {'name': short_name(part.name), 'arguments': part.arguments}}
                 for part in parts if isinstance(part, ToolCall)]
        if not (text or calls):
            return []
        # Empty rather than null beside calls: not every server takes null, or nothing.
        message = {'role': 'assistant', 'content': text}
        return [{**message, 'tool_calls': calls} if calls else message]

    def _results_turn(self, results):
        """Tool messages hold text alone: media follow in a user message."""
        messages, media = [], []
        for result in results:
            id = shortened(result.call.id, MAX_CHAT_ID_CHARS)
            texts = [part for part in result.parts if isinstance(part, Text)]
            own_media = [part for part in result.parts if isinstance(part, Media)]
            if own_media:
                texts.append(Text('[see attached media]'))
                label = f'Media of the result of {result.call.name} ({result.call.id}):'
                media += [Text(label), *own_media]
            messages.append({'role': 'tool', 'tool_call_id': id, 'content': joined_text(texts)})
        return messages + (self._user_turn(media) if media else [])

    def _part(self, part):
        if isinstance(part, Text):
            return {'type': 'text', 'text': part.text}
        if part.kind == 'image':
            return {'type': 'image_url', 'image_url': {'url': part.url}}
        if not part.url.startswith('data:'):
            return {'type': 'text', 'text': f'[document: {part.url}]'}
        if self._limits.takes_files:
            return {'type': 'file', 'file': {'filename': part.name, 'file_data': part.url}}
        self._conversation.notes.leave_out('document')
        return {'type': 'text', 'text': f'[document omitted: {part.name}]'}


TOOL_MODES = {'auto': 'auto', 'any': 'required', 'none': 'none'}


def joined_text(parts):
    return '\n'.join(part.text for part in parts if isinstance(part, Text))


# -- Responses -----------------------------------------------------------------

MAX_RESPONSES_ID_CHARS = 64
#: Codex refuses a request without instructions.
DEFAULT_INSTRUCTIONS = 'You are a helpful assistant.'


class ResponsesWriter(RequestWriter):
    """Writes a Responses request (platform.openai.com/docs/api-reference/responses); for Codex
    without what it refuses.  Always a stream: a plain answer is folded from it."""

    def write(self):
        body, target, limits = self._body, self._target, self._limits
        choice = as_dict(body.get('tool_choice'))
        out = {'model': target.model, 'instructions': self._instructions(), 'input': self._turns(),
               'parallel_tool_calls': choice.get('disable_parallel_tool_use') is not True,
               'store': False, 'stream': True, **self._tool_fields()}
        if (limit := self._output_limit()) is not None and not target.is_codex:
            out['max_output_tokens'] = max(LEAST_OUTPUT_TOKENS, limit)
        if limits.efforts or target.is_codex:
            out['include'] = ['reasoning.encrypted_content']
        out.update(self._reasoning())
        if not target.is_codex and limits.sampling == 'always':
            out.update(self._sampling_fields(None))
        if schema := json_schema_format(body):
            out['text'] = {'format': {'type': 'json_schema', **schema}}
        if (key := cache_key(body)) and (target.is_codex or target.is_openai):
            out['prompt_cache_key'] = key
        return out

    def _instructions(self):
        """The system prompt, for Codex with what the system said later."""
        later = [joined_text(turn.parts) for turn in self._conversation.turns
                 if self._target.is_codex and turn.role == 'system']
        texts = filter(None, (self._conversation.system, *later))
        return '\n\n'.join(texts) or DEFAULT_INSTRUCTIONS

    def _reasoning(self):
        """Here reasoning and tools go together.  Without `summary` no thinking is ever shown."""
        if not (effort := self._effort()):
            return {}
        summary = {'summary': 'auto'} if wants_thinking(self._body)[0] else {}
        return {'reasoning': {'effort': effort, **summary}}

    def _tool_fields(self):
        tools = list(map(self._tool, self._conversation.tools))
        if self._conversation.web_search:
            tools.append(responses_web_search(self._conversation.web_search))
        mode, name = read_tool_choice(self._conversation)
        if not tools:
            return {}
        choice = TOOL_MODES.get(mode or '')
        if mode == 'tool':
            choice = {'type': 'function', 'name': short_name(name)}
        elif mode == 'web_search':
            allowed = [{'type': 'web_search'}]
            choice = 'required' if len(tools) == 1 else {
                'type': 'allowed_tools', 'mode': 'required', 'tools': allowed}
        return {'tools': tools, 'tool_choice': choice} if choice else {'tools': tools}

    def _tool(self, tool):
        function = {'type': 'function', 'name': short_name(tool.name), 'parameters': tool.schema,
                    'strict': tool.is_strict and meets_strict_rules(tool.schema)}
        return {**function, 'description': tool.description} if tool.description else function

    def _system_turn(self, parts):
        """Codex takes no system message among the input."""
        return [] if self._target.is_codex else self._user_turn(parts, 'developer')

    def _user_turn(self, parts, role='user'):
        content = list(map(responses_part, parts))
        return [{'type': 'message', 'role': role, 'content': content}]

    def _assistant_turn(self, parts):
        """Text, calls and reasoning in order.  More servers take a text than a list of parts."""
        items = []
        for part in parts:
            if isinstance(part, Text):
                listed = [{'type': 'output_text', 'text': part.text}]
                items.append({'type': 'message', 'role': 'assistant',
                              'content': listed if self._target.is_codex else part.text})
            elif isinstance(part, ToolCall):
                items.append({'type': 'function_call', 'name': short_name(part.name),
                              'call_id': shortened(part.id, MAX_RESPONSES_ID_CHARS),
                              'arguments': part.arguments})
            elif isinstance(part, Reasoning):
                items.append({'type': 'reasoning', 'summary': [],
                              'encrypted_content': part.payload})
        return items

    def _results_turn(self, results):
        items = []
        for result in results:
            has_media = any(isinstance(part, Media) for part in result.parts)
            output = (list(map(responses_part, result.parts)) if has_media
                      else joined_text(result.parts))
            items.append({'type': 'function_call_output', 'output': output,
                          'call_id': shortened(result.call.id, MAX_RESPONSES_ID_CHARS)})
        return items


def responses_web_search(tool):
    search: dict = {'type': 'web_search'}
    if as_list(tool.get('allowed_domains')):
        search['filters'] = {'allowed_domains': tool['allowed_domains']}
    if location := as_dict(tool.get('user_location')):
        search['user_location'] = {'type': 'approximate', **location}
    return search


def responses_part(part):
    if isinstance(part, Text):
        return {'type': 'input_text', 'text': part.text}
    if part.kind == 'image':
        return {'type': 'input_image', 'image_url': part.url, 'detail': 'auto'}
    if part.url.startswith('data:'):
        return {'type': 'input_file', 'filename': part.name, 'file_data': part.url}
    return {'type': 'input_file', 'file_url': part.url}


# -- what is answered here -----------------------------------------------------

#: Tokens of an image and of a PDF's page, roughly; and the bytes of a page in base64.
IMAGE_TOKENS, PAGE_TOKENS, PAGE_BYTES = 1600, 2000, 65_536
#: Better too many than too few: a client then compacts early, not late.
TOKEN_MARGIN = 1.08


def estimate_tokens(body: dict) -> int:
    """About how many input tokens a count_tokens or Messages request has."""
    tokens = 4 * len(as_list(body.get('messages'))) + sum(
        estimate_value(body.get(name)) for name in ('system', 'messages', 'tools'))
    return max(1, math.ceil(tokens * TOKEN_MARGIN))


def estimate_value(value):
    """Four characters a token; of scripts without spaces one."""
    if isinstance(value, str):
        wide = 0 if value.isascii() else sum(c >= '\u2e80' for c in value)
        return wide + (len(value) - wide) / 4
    if isinstance(value, list):
        return sum(map(estimate_value, value))
    if not isinstance(value, dict):
        return 1
    if value.get('type') == 'image':
        return IMAGE_TOKENS
    source = as_dict(value.get('source'))
    if value.get('type') == 'document' and source.get('type') == 'base64':
        return PAGE_TOKENS * max(1, len(str(source.get('data'))) // PAGE_BYTES)
    return sum(len(name) / 4 + estimate_value(inner) for name, inner in value.items())


def model_info(model: str) -> dict:
    """One entry of /v1/models."""
    return {'type': 'model', 'id': model, 'display_name': model,
            'created_at': '1970-01-01T00:00:00Z'}


# ==============================================================================
# Response translation
# ==============================================================================
# OpenAI's answers as Anthropic's.  A stream of each wire format reads what comes and has it
# written by MessageEvents, which alone knows the grammar of the events that a client sees.  A
# plain answer is the same events, folded.

class SseParser:
    """Cuts bytes into the data of server-sent events, however they were split."""

    def __init__(self):
        self._rest = bytearray()      # the beginning of an event, with LF as line ends
        self._held = b''              # a CR that may be half of a CR LF

    def feed(self, data: bytes) -> list[str]:
        """[data of an event, ...] of those that have any.  Raises UpstreamCut for one too long."""
        data, self._held = self._held + data, b''
        if data.endswith(b'\r'):
            data, self._held = data[:-1], b'\r'
        searched = max(0, len(self._rest) - 1)
        self._rest += with_lf(data)
        last = self._rest.rfind(b'\n\n', searched)
        if last < 0:
            if len(self._rest) > MAX_BODY_BYTES:
                raise UpstreamCut('an event has no end')
            return []
        whole = bytes(self._rest[:last])
        del self._rest[:last + 2]
        return self._read(whole)

    def end(self) -> list[str]:
        """The same for an event that the end of the stream ended."""
        rest, self._rest = bytes(self._rest) + with_lf(self._held), bytearray()
        return self._read(rest)

    @staticmethod
    def _read(data):
        found = map(DATA_LINE.findall, data.split(b'\n\n'))
        return [b'\n'.join(lines).decode('utf-8', 'replace') for lines in found if lines]


class Block:
    """One content block on its way to the client."""

    def __init__(self, kind, key):
        self.kind, self.key = kind, key       # 'text', 'thinking', 'tool_use'
        self.id = self.name = None    # of a call
        self.received = []            # pieces of the text, of the thinking, of the arguments
        self.unsent = []
        self.payload = None           # encrypted reasoning, of a thinking block
        self.is_open = False
        self.is_done = False          # nothing more comes

    @property
    def can_open(self):
        if self.kind == 'tool_use':
            return bool(self.name and self.id)
        return bool(self.unsent or self.payload)

    def is_whole(self):
        """Whether it may be closed, now that another block follows."""
        if self.kind != 'tool_use' or self.is_done:
            return True
        last = self.received[-1] if self.received else ''
        return last.rstrip().endswith('}') and object_or_none(''.join(self.received)) is not None


#: OpenAI's finish reasons that are not its way to say that all is well.
STOP_REASONS = {'length': 'max_tokens', 'content_filter': 'refusal'}


class MessageEvents(EventStream):
    """Writes the events of one message: blocks strictly one after another, whatever the order in
    which their parts come, each with a key, the upstream's name for its block.  Only the first
    of the queue is open; the others wait for it to be whole (docs: streaming messages)."""

    _status_of = staticmethod(error_status)

    def __init__(self, conversation, message_id, stops=(), clean=redact):
        super().__init__()
        self._conversation, self._message_id = conversation, message_id
        self._shows_thinking, self._keeps_thinking = wants_thinking(conversation.body)
        self._clean = clean           # takes secrets out of an upstream's text
        self._sent_chars = 0
        self._stops = StopWatch(stops) if stops else None
        self._events = []             # written, not yet taken
        self._queue = []              # [Block, ...]
        self._closed = {}             # key -> id of a block that was closed
        self._count = 0               # blocks opened so far: the next one's index
        self._called = False          # a tool_use block was opened
        self._ids = set()             # of the calls so far
        self._refused = False

    def _take(self):
        """[event, ...] since the last time."""
        events, self._events = self._events, []
        if self.opened_by is None:
            self.opened_by = next((event['type'] for event in events
                                   if event['type'] not in HELD_BACK), None)
        return events

    # -- what was read ---------------------------------------------------------

    def _write_text(self, delta):
        if self._stops and delta:
            delta = self._stops.feed(delta)
        if delta:
            self._append('text', 'text', delta)
        if self._stops and self._stops.hit:
            self._finish('stop', self._stops.hit)

    def _release_held_text(self):
        """What looked like the beginning of a stop sequence, and was none."""
        if self._stops and (held := self._stops.rest()):
            self._append('text', 'text', held)

    def _write_refusal(self, delta):
        self._refused = True
        self._write_text(delta)

    def _write_thinking(self, delta, key='thinking'):
        if delta and self._shows_thinking:
            self._append('thinking', key, delta)

    def _end_thinking(self, key, payload):
        """A reasoning item is complete; `payload` is what may be given back, or None."""
        block = self._find(key)
        if block is None and payload and self._keeps_thinking and key not in self._closed:
            block = self._add('thinking', key)
        if block:
            block.payload, block.is_done = payload, True
            self._advance()

    def _write_call(self, key, id=None, name=None):
        """A call's header, or a part of it.  Another id under a known key is another call."""
        block = self._find(key)
        if id and block and block.id and id != block.id:
            block.is_done, block = True, None
        if block is None and key in self._closed:
            if not id or id == self._closed[key]:
                return                # said once more after its end
            del self._closed[key]
        if block is None:
            self._release_held_text()
            block = self._add('tool_use', key)
        block.id = block.id or id
        block.name = block.name or name
        self._advance()

    def _write_arguments(self, key, delta):
        if delta and (key not in self._closed or self._find(key)):
            self._append('tool_use', key, delta)

    def _complete_arguments(self, key, whole):
        """All of a call's arguments; what came of them so far is not repeated."""
        block = self._find(key)
        so_far = ''.join(block.received) if block else ''
        if whole and whole.startswith(so_far):
            self._write_arguments(key, whole[len(so_far):])

    def _end_call(self, key):
        if block := self._find(key):
            block.is_done = True
            self._advance()

    def _note_usage(self, usage):
        """Remembers OpenAI's usage: the latest counts."""
        self.usage = read_openai_usage(usage) or self.usage

    def _finish(self, reason, stop_sequence=None):
        """Ends the message: `reason` is OpenAI's word for why, a stop sequence what was met."""
        if self.is_over:
            return
        self._release_held_text()
        for place, block in enumerate(self._queue):
            block.is_done = True
            if block.kind == 'tool_use' and not block.id:
                block.id = f'toolu_{self._message_id[4:]}{self._count + place}'
        named = [block for block in self._queue if block.is_open or block.can_open]
        self.dropped_calls = len(self._queue) - len(named)
        self._queue = named
        self._advance()
        self._start()
        self.is_over = self.stopped = True
        self.stop_reason = ('stop_sequence' if stop_sequence else 'refusal' if self._refused else
                            STOP_REASONS.get(reason, 'tool_use' if self._called else 'end_turn'))
        delta = {'stop_reason': self.stop_reason, 'stop_sequence': stop_sequence}
        self._complete_usage()
        self._events += [{'type': 'message_delta', 'delta': delta, 'usage': self.usage},
                         {'type': 'message_stop'}]

    def _complete_usage(self):
        """Estimates what the upstream did not report."""
        self.usage = usage = {**NO_USAGE, **self.usage}
        if not (usage['input_tokens'] or usage['cache_read_input_tokens']):
            usage['input_tokens'] = estimate_tokens(self._conversation.body)
        usage['output_tokens'] = usage['output_tokens'] or math.ceil(self._sent_chars / 4)

    def _fail(self, error):
        """Ends with an error event; a stop after it would make half an answer look whole."""
        if self.is_over:
            return
        message = str(error.get('message') or 'the upstream failed')[:MAX_MESSAGE_CHARS]
        self.is_over, self.failure = True, {**error, 'message': message}
        self._events.append({'type': 'error', 'error': {
            'type': error_type(self.failure_status), 'message': self._clean(message)}})

    # -- the grammar -----------------------------------------------------------

    def _find(self, key):
        return next((block for block in reversed(self._queue)
                     if block.key == key and not block.is_done), None)

    def _add(self, kind, key):
        self._queue.append(Block(kind, key))
        return self._queue[-1]

    def _append(self, kind, key, delta):
        block = self._find(key) or self._add(kind, key)
        block.received.append(delta)
        block.unsent.append(delta)
        self._advance()

    def _advance(self):
        """Sends what the first block has, and goes on to the next as far as that is whole."""
        while self._queue and not self.is_over:
            head = self._queue[0]
            if not head.is_open:
                head = next((block for block in self._queue if block.can_open), None)
                if head is None:
                    return
                self._queue.remove(head)
                self._queue.insert(0, head)
                self._open(head)
            self._send_deltas(head)
            is_last = len(self._queue) == 1
            if not (head.is_done or not is_last and head.is_whole()):
                return
            self._close(head)

    def _start(self):
        if self.has_begun:
            return
        self.has_begun = True
        self._events.append({'type': 'message_start', 'message': {
            'id': self._message_id, 'type': 'message', 'role': 'assistant',
            'model': self._conversation.body.get('model'), 'content': [],
            'stop_reason': None, 'stop_sequence': None, 'usage': NO_USAGE}})

    def _open(self, block):
        self._start()
        block.is_open, block.index = True, self._count
        self._count += 1
        content = {'type': block.kind, block.kind: ''}
        if block.kind == 'thinking':
            content['signature'] = ''
        elif block.kind == 'tool_use':
            self._called = True
            content = {'type': 'tool_use', 'id': self._own_id(block.id),
                       'name': self._conversation.names.get(block.name, block.name), 'input': {}}
        self._events.append({'type': 'content_block_start', 'index': block.index,
                             'content_block': content})

    def _own_id(self, id):
        """A call's id as Anthropic takes it; one that another call has already is told apart."""
        id = UNSAFE.sub('_', id)
        while id in self._ids:
            id = f'{id}_{self._count}'
        self._ids.add(id)
        return id

    def _send_deltas(self, block):
        if block.unsent:
            type, field = DELTAS[block.kind]
            delta = {'type': type, field: ''.join(block.unsent)}
            self._sent_chars += len(delta[field])
            self._events.append({'type': 'content_block_delta', 'index': block.index,
                                 'delta': delta})
            block.unsent = []

    def _close(self, block):
        if block.kind == 'thinking':
            seal = PAYLOAD + block.payload if block.payload else NO_PAYLOAD
            self._events.append({'type': 'content_block_delta', 'index': block.index,
                                 'delta': {'type': 'signature_delta', 'signature': seal}})
        self._events.append({'type': 'content_block_stop', 'index': block.index})
        self._queue.remove(block)
        if block.kind != 'text':          # more text is simply another block
            self._closed[block.key] = block.id


DELTAS = {'text': ('text_delta', 'text'), 'thinking': ('thinking_delta', 'thinking'),
          'tool_use': ('input_json_delta', 'partial_json')}
NO_USAGE = {'input_tokens': 0, 'cache_creation_input_tokens': 0, 'cache_read_input_tokens': 0,
            'output_tokens': 0}


class StopWatch:
    """Ends the text before the first stop sequence where the model has no parameter for them."""

    def __init__(self, stops):
        self._stops, self._held = stops, ''
        self.hit = None               # the sequence that was met

    def feed(self, delta):
        """The text that may go out: what could be the beginning of a sequence is held."""
        text = self._held + delta
        if places := [(text.find(stop), stop) for stop in self._stops if stop in text]:
            place, self.hit = min(places)
            self._held = ''
            return text[:place]
        longest = max(map(len, self._stops)) - 1
        size = len(text)
        place = next((place for place in range(max(0, size - longest), size)
                      if any(stop.startswith(text[place:]) for stop in self._stops)), size)
        self._held = text[place:]
        return text[:place]

    def rest(self):
        held, self._held = self._held, ''
        return held


def message_from_events(events: list[dict]) -> dict:
    """The message that a stream's events add up to: Claude's own too, with fields unknown here."""
    message = {}
    blocks: dict[str, tuple[dict, dict]] = {}     # index -> (block, {field: [piece, ...]})
    for event in events:
        type, index = event.get('type'), str(event.get('index'))
        if type == 'message_start':
            message = dict(as_dict(event.get('message')))
        elif type == 'content_block_start':
            blocks[index] = dict(as_dict(event.get('content_block'))), {}
        elif type == 'content_block_delta' and index in blocks:
            note_delta(*blocks[index], as_dict(event.get('delta')))
        elif type == 'message_delta':
            usage = {name: n for name, n in as_dict(event.get('usage')).items() if n is not None}
            others = {n: v for n, v in event.items() if n not in ('type', 'delta', 'usage')}
            message.update({**others, **as_dict(event.get('delta')),
                            'usage': {**as_dict(message.get('usage')), **usage}})
    return {**message, 'content': [fold_block(*block) for block in blocks.values()]}


def note_delta(block, pieces, delta):
    for name, value in delta.items():
        if name == 'citation':
            block['citations'] = [*as_list(block.get('citations')), value]
        elif isinstance(value, str) and name != 'type':
            pieces.setdefault(name, []).append(value)


def fold_block(block, pieces):
    text = ''.join(pieces.pop('partial_json', ()))
    for name, parts in pieces.items():
        block[name] = (text_or_none(block.get(name)) or '') + ''.join(parts)
    if not text.strip():
        return block
    try:
        # Small models put bare line ends into their texts.
        arguments = as_dict(json.loads(text, strict=False))
        json.dumps(arguments, allow_nan=False)        # 1e999 would be no JSON on the way out
        return {**block, 'input': arguments}
    except (ValueError, RecursionError):      # cut short, or never JSON: the client will see
        return block


def events_from_message(message: dict) -> list[dict]:
    """[event, ...] that add up to a message."""
    events = [{'type': 'message_start', 'message': {
        **message, 'content': [], 'stop_reason': None, 'stop_sequence': None}}]
    for index, block in enumerate(map(as_dict, as_list(message.get('content')))):
        deltas, begun = [], dict(block)
        if 'input' in block:
            begun['input'] = {}
            deltas.append({'type': 'input_json_delta', 'partial_json': json.dumps(block['input'])})
        for name in ('text', 'thinking', 'signature'):
            if isinstance(block.get(name), str):
                begun[name] = ''
                deltas.append({'type': f'{name}_delta', name: block[name]})
        events.append({'type': 'content_block_start', 'index': index, 'content_block': begun})
        events += [{'type': 'content_block_delta', 'index': index, 'delta': delta}
                   for delta in deltas]
        events.append({'type': 'content_block_stop', 'index': index})
    delta = {name: message.get(name) for name in ('stop_reason', 'stop_sequence')}
    return [*events, {'type': 'message_delta', 'delta': delta,
                      'usage': as_dict(message.get('usage'))}, {'type': 'message_stop'}]


#: Where a usage has its counts; the first that is not 0 is taken.
USAGE_PLACES = {
    'input': ('prompt_tokens', 'input_tokens'),
    'read': ('prompt_tokens_details.cached_tokens', 'input_tokens_details.cached_tokens'),
    'written': ('prompt_tokens_details.cache_write_tokens',
                'input_tokens_details.cache_write_tokens'),
    'output': ('completion_tokens', 'output_tokens'),
    'thinking': ('completion_tokens_details.reasoning_tokens',
                 'output_tokens_details.reasoning_tokens'),
}


def read_openai_usage(usage):
    """OpenAI's usage, of either wire format, in Anthropic's words; {} when there is none."""
    if not usage:                     # the usual chunk
        return {}
    counts = {name: next(filter(None, (count_at(usage, place) for place in places)), 0)
              for name, places in USAGE_PLACES.items()}
    total, read, written, output, thinking = counts.values()
    if not (total or output):
        return {}
    details = {'output_tokens_details': {'thinking_tokens': thinking}} if thinking else {}
    return {'input_tokens': max(0, total - read - written), 'cache_creation_input_tokens': written,
            'cache_read_input_tokens': read, 'output_tokens': output, **details}


def count_at(usage, place):
    """The count at a place like 'a.b'; 0 where there is none."""
    for name in place.split('.'):
        usage = as_dict(usage).get(name, 0)
    return max(0, usage) if is_whole(usage) else 0


def content_text(content):
    """Text that some servers send as a list of parts."""
    if isinstance(content, list):
        return ''.join(block_text(as_dict(part)) for part in content)
    return content if isinstance(content, str) else ''


class TranslatedStream(MessageEvents):
    """An OpenAI answer, read piece by piece and written as events of the Messages API."""

    _read_event: Callable[[str], None]        # reads the data of an event
    _read_answer: Callable[[dict], None]      # reads a whole answer; raises ValueError
    can_be_asked_whole = True
    sends_pings = can_be_carried = False

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._parser = SseParser()

    def read(self, data: bytes) -> list[dict]:
        """[event, ...] that these bytes of the upstream's stream give."""
        self._read_all(self._parser.feed(data))
        return self._take()

    def read_end(self, is_cut: bool = False) -> list[dict]:
        """[event, ...] that the end of the upstream's stream gives; `is_cut`: it broke off."""
        self._read_all(self._parser.end())
        self._read_stop(is_cut)
        return self._take()

    def _read_all(self, texts):
        for text in texts:
            if self.is_over:          # what follows the end is no part of the message
                return
            self._read_event(text)

    def _read_stop(self, is_cut):
        """What a stream's end says: without a terminal event it was cut."""

    def read_whole(self, data: bytes) -> list[dict]:
        """[event, ...] of an answer that is no stream.  Raises ValueError when it is none."""
        self._read_answer(loads_object(data))
        return self._take()

    def feed(self, data):
        return b''.join(map(event_bytes, self.read(data)))

    def last(self, is_cut=False):
        return b''.join(map(event_bytes, self.read_end(is_cut)))


class ChatStream(TranslatedStream):
    """Reads Chat Completions: chunks of a stream, or a whole completion."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._reason = None           # to finish; the usage may come after it
        self._is_done = False         # [DONE] came
        self._unnumbered = 0          # calls without an index
        self._last_call = 'call 0'

    def _read_event(self, data):
        if data == '[DONE]':
            self._is_done = True
            if self._reason:
                self._finish(self._reason)
        else:                         # what is no object is not one of theirs
            self._read_chunk(object_or_none(data) or {}, 'delta')

    def _read_answer(self, completion):
        choices = [{**as_dict(choice), 'index': 0}
                   for choice in as_list(completion.get('choices'))[:1]]
        self._read_chunk({**completion, 'choices': choices}, 'message')
        if not (choices or self.failure):
            raise ValueError('no choices')
        self._finish(self._reason or 'stop')

    def _read_chunk(self, chunk, part):
        """Reads a chunk or completion; `part` is what a choice calls what it brings."""
        if (error := chunk.get('error')) and isinstance(error, (dict, str)):
            return self._fail(error_object(error))
        self._note_usage(chunk.get('usage'))
        for choice in map(as_dict, as_list(chunk.get('choices'))):
            if choice.get('index') in (0, None):
                if self._reason is None:      # afterwards only usage counts
                    self._read_delta(as_dict(choice.get(part)))
                self._reason = self._reason or text_or_none(choice.get('finish_reason'))

    def _read_stop(self, is_cut):
        """The stream's end: complete where a finish reason came, even without [DONE]; with [DONE]
        alone only if it was not cut (llama-cpp-python ends a request so for the next one)."""
        if self._reason or self._is_done and not is_cut:
            self._finish(self._reason or 'stop')

    def _read_delta(self, delta):
        self._write_thinking(reasoning_text(delta))
        self._write_text(content_text(delta.get('content')))
        if delta.get('refusal'):
            self._write_refusal(str(delta['refusal']))
        calls = as_list(delta.get('tool_calls'))
        if isinstance(delta.get('function_call'), dict):      # the older form of one call
            calls = [{'index': 0, 'id': None, 'function': delta['function_call']}]
        for call in calls:
            self._read_call(as_dict(call))

    def _read_call(self, call):
        function = as_dict(call.get('function'))
        id, name = text_or_none(call.get('id')), text_or_none(function.get('name'))
        key = call.get('index')
        if not is_whole(key):         # some servers send each call whole, without one
            self._unnumbered += name is not None
            key = id or (f'call {self._unnumbered}' if name else self._last_call)
        self._last_call = key
        self._write_call(key, id, name)
        arguments = function.get('arguments')
        if isinstance(arguments, dict):
            arguments = dump_body(arguments).decode()
        self._write_arguments(key, text_or_none(arguments))


def reasoning_text(delta):
    """The thinking in a delta, whatever its server calls it."""
    return (text_or_none(delta.get('reasoning_content')) or text_or_none(delta.get('reasoning'))
            or content_text(as_list(delta.get('reasoning_details'))))


class ResponsesStream(TranslatedStream):
    """Reads Responses: events of a stream, or a whole response."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._has_text = set()        # keys of messages whose text came
        self._parts = {}              # key of a reasoning item -> summary parts so far
        self._call_ids = set()        # of the calls that came

    def _read_event(self, data):
        event = object_or_none(data) or {}    # none: a server's '[DONE]', or not one of theirs
        if read := RESPONSES_EVENTS.get(str(event.get('type'))):
            read(self, event)

    def _read_answer(self, response):
        status = response.get('status')
        if response.get('error') or status == 'failed':
            return self._fail(error_object(response.get('error') or {}))
        if status not in (None, 'completed', 'incomplete') or not isinstance(
                response.get('output'), list):
            raise ValueError('no output')
        return self._read_terminal({'response': response})

    def _key(self, event):
        place, item = event.get('output_index'), as_dict(event.get('item'))
        if is_whole(place):
            return place
        return text_or_none(event.get('item_id')) or text_or_none(item.get('id')) or 'item'

    def _read_text(self, event):
        self._has_text.add(self._key(event))
        self._write_text(str(event.get('delta') or ''))

    def _read_refusal(self, event):
        self._has_text.add(self._key(event))
        self._write_refusal(str(event.get('delta') or ''))

    def _read_whole_refusal(self, event):
        if self._key(event) not in self._has_text:
            self._read_refusal({**event, 'delta': event.get('refusal')})

    def _read_arguments(self, event):
        self._write_arguments(self._key(event), text_or_none(event.get('delta')))

    def _read_whole_arguments(self, event):
        self._complete_arguments(self._key(event), text_or_none(event.get('arguments')))

    def _read_item_added(self, event):
        item = as_dict(event.get('item'))
        if item.get('type') == 'function_call':
            self._read_header(self._key(event), item)

    def _read_header(self, key, item):
        call_id = text_or_none(item.get('call_id'))
        self._call_ids.add(call_id)
        self._write_call(key, call_id, text_or_none(item.get('name')))

    def _read_item_done(self, event):
        item, key = as_dict(event.get('item')), self._key(event)
        if item.get('type') == 'function_call':
            self._read_header(key, item)
            self._complete_arguments(key, text_or_none(item.get('arguments')))
            self._end_call(key)
        elif item.get('type') == 'reasoning':
            self._read_reasoning_item(key, item)
        elif item.get('type') == 'message' and key not in self._has_text:
            self._has_text.add(key)
            for part in map(as_dict, as_list(item.get('content'))):
                if part.get('type') == 'refusal':
                    self._write_refusal(str(part.get('refusal') or ''))
                else:
                    self._write_text(block_text(part))

    def _read_reasoning_item(self, key, item):
        if key not in self._parts:
            parts = as_list(item.get('summary')) or as_list(item.get('content'))
            parts = [block_text(as_dict(part)) for part in parts]
            self._write_thinking('\n\n'.join(part for part in parts if part), key)
        payload = item.get('encrypted_content')
        self._parts[key] = 0
        self._end_thinking(key, payload if isinstance(payload, str) else None)

    def _read_summary_part(self, event):
        key = self._key(event)
        if self._parts.get(key):
            self._write_thinking('\n\n', key)
        self._parts[key] = self._parts.get(key, 0) + 1

    def _read_summary(self, event):
        key = self._key(event)
        self._parts.setdefault(key, 1)
        self._write_thinking(str(event.get('delta') or ''), key)

    def _read_terminal(self, event):
        """The terminal event; it may hold items that never came as events of their own."""
        response = as_dict(event.get('response'))
        known = {'message': bool(self._has_text), 'reasoning': bool(self._parts)}
        for place, item in enumerate(map(as_dict, as_list(response.get('output')))):
            has_come = known.get(str(item.get('type')))
            if not has_come and text_or_none(item.get('call_id')) not in self._call_ids - {None}:
                item_id = text_or_none(item.get('id')) or f'output {place}'
                self._read_item_done({'item': item, 'item_id': item_id})
        self._note_usage(response.get('usage'))
        reason = text_or_none(as_dict(response.get('incomplete_details')).get('reason'))
        if (reason or response.get('status') == 'incomplete'
                or event.get('type') == 'response.incomplete'):
            # A call in it may be half a call, whatever the reason.
            reason = 'content_filter' if reason == 'content_filter' else 'length'
        self._finish(reason or 'stop')

    def _read_failed(self, event):
        """An error has three shapes: in the response, in `error`, or flat."""
        error = as_dict(event.get('response')).get('error') or event.get('error') or event
        self._fail(error_object(error))

    def _read_rate_limits(self, event):
        limits = as_dict(event.get('rate_limits'))
        if limits.get('limit_reached') is True:
            seconds = as_dict(limits.get('primary')).get('reset_after_seconds')
            self._fail({'code': 'usage_limit_reached', 'resets_in_seconds': seconds,
                        'message': 'The usage limit has been reached'})


RESPONSES_EVENTS = {
    'response.output_text.delta': ResponsesStream._read_text,
    'response.refusal.delta': ResponsesStream._read_refusal,
    'response.refusal.done': ResponsesStream._read_whole_refusal,
    'response.function_call_arguments.delta': ResponsesStream._read_arguments,
    'response.function_call_arguments.done': ResponsesStream._read_whole_arguments,
    'response.output_item.added': ResponsesStream._read_item_added,
    'response.output_item.done': ResponsesStream._read_item_done,
    'response.reasoning_summary_part.added': ResponsesStream._read_summary_part,
    'response.reasoning_summary_text.delta': ResponsesStream._read_summary,
    'response.reasoning_text.delta': ResponsesStream._read_summary,
    'response.completed': ResponsesStream._read_terminal,
    'response.done': ResponsesStream._read_terminal,
    'response.incomplete': ResponsesStream._read_terminal,
    'response.failed': ResponsesStream._read_failed,
    'response.error': ResponsesStream._read_failed,
    'error': ResponsesStream._read_failed,
    'codex.rate_limits': ResponsesStream._read_rate_limits,
}


class Wire(NamedTuple):
    """One of OpenAI's wire formats."""
    writer: type[RequestWriter]
    stream: type[TranslatedStream]

    def translate(self, conversation: Conversation, target: Target) -> dict:
        """The request's body."""
        return self.writer(conversation, target).write()


WIRES = {
    CHAT_COMPLETIONS: Wire(ChatWriter, ChatStream),
    RESPONSES: Wire(ResponsesWriter, ResponsesStream),
}


def stops_to_watch(conversation, target):
    """The stop sequences that are not sent upstream."""
    body, limits = conversation.body, find_limits(target.model)
    is_sent = target.wire == CHAT_COMPLETIONS and stop_fields(body, limits)
    return () if is_sent else tuple(wanted_stops(body))


def answer_stream(conversation: Conversation, target: Target, message_id: str,
                  clean: Callable[[str], str] = redact) -> TranslatedStream:
    """What reads the answer to a translated request."""
    stops = stops_to_watch(conversation, target)
    return WIRES[target.wire].stream(conversation, message_id, stops, clean)


# ==============================================================================
# Cooldowns
# ==============================================================================
# Who cools until when, and the queue of those who wait for it.  Skipping a key and waiting
# for it ask the same question here, so they cannot disagree.

#: A request that tries what has just come back has so long to be refused; then the next follows.
PROBE_S = 3
#: As many at a time, and what came back is as good as proved.
RAMP_END = 64
#: A cooldown that ended so long ago keeps nobody in line.
UNPROVED_S = 60
#: A server that could not be reached is tried so often by those who wait for it.
RETRY_S = 1


class Slot(NamedTuple):
    """What an attempt cools by.  With less of it named, a place that covers more."""
    ref: str | None           # of the key; None: whoever's server it is
    model: str | None = None
    feature: str | None = None        # that has limits of its own: 'fast', '1m'
    server: str | None = None         # base URL

    @property
    def places(self):
        """Where a cooldown keeps this from being tried, the narrowest place first."""
        ref, model, feature, server = self
        return tuple(dict.fromkeys((Slot(ref, model, feature), Slot(ref, model), Slot(ref),
                                    Slot(None, server=server))))

    def place(self, scope):
        """The place that an outcome's scope covers."""
        if scope is Scope.SERVER:
            return Slot(None, server=self.server)
        return Slot(self.ref) if scope is Scope.KEY else self._replace(server=None)


class Cooling(NamedTuple):
    """One cooldown."""
    key: Key                  # that met it
    place: Slot
    outcome: Outcome
    began: float              # when it was last met; like `until` on Cooldowns' clock
    until: float
    until_unix_s: float       # the same by the wall clock: the other one stops while a Mac sleeps
    resets_unix_s: float      # when the limit itself ends: at `until`, or later
    length_s: float
    digest: str | None        # of the secret that was refused

    @property
    def model(self):
        """None: every model."""
        return self.place.model


class Ticket:
    """A request's place in the queue.  `wake` is set whenever looking again may be worth it."""

    def __init__(self, wake):
        self.slots = frozenset()      # {Slot, ...}: what it waits for; none while it tries one
        self.wake = wake


class Line:
    """Those who try what has just come back: one at first; twice as many with each that is
    answered, or that goes on for PROBE_S without a refusal."""

    def __init__(self):
        self.allowed = 1
        self.since = {}               # a request's token -> since when it tries

    def widen(self):
        self.allowed = min(2 * self.allowed, RAMP_END)

    def room(self, now):
        """How many more may try now."""
        for token in [token for token, since in self.since.items() if now - since >= PROBE_S]:
            del self.since[token]
            self.widen()
        return self.allowed - len(self.since)


class Cooldowns:
    """Cooldowns and the queue.  A cooldown whose time is over stays on record until an answer
    proves its place: while it does, requests try it in line, and no stampede meets the key."""

    def __init__(self, clock=time.monotonic, now=time.time):
        self._clock, self._now = clock, now
        self._lock = threading.Lock()
        self._cooling = {}    # place -> Cooling
        self._lines = {}      # place whose time is over -> Line
        self._repeats = {}    # place -> {rule name: cooldowns in a row that doubled}
        self._strikes = {}    # place -> {rule name: such answers in a row}
        self._asked = {}      # place -> (how often it was asked as a last hope, when last)
        self._paid = {}       # key's ref -> unix seconds
        self._queue = []      # [Ticket, ...], first come first
        self.changes = 0      # counts what may have changed the report of the state

    def cool(self, key, slot, outcome, limit_s, digest=None):
        """Cools what the outcome's rule says, at most `limit_s`; the seconds, 0 for none.  A
        cooldown never shortens a longer one."""
        rule = outcome.rule
        if rule.scope is None:
            return 0
        place = slot.place(rule.scope)
        with self._lock:
            now = self._clock()
            self._lines.pop(place, None)
            strikes = self._strikes.setdefault(place, {}) if rule.strikes > 1 else {}
            strikes[rule.name] = strikes.get(rule.name, 0) + 1
            if strikes[rule.name] < rule.strikes:
                return 0
            # A second at least: a hint of 0 must not become a busy loop of the queue.
            seconds = min(max(1, self._length_locked(place, outcome, now)), limit_s)
            current = self._cooling.get(place)
            if current and current.until > now + seconds and self._left_s(current) > 0:
                self._cooling[place] = current._replace(began=now)
            elif seconds > 0:
                unix_s = self._now()
                self._cooling[place] = Cooling(
                    key, place, outcome, now, now + seconds, unix_s + seconds,
                    unix_s + max(seconds, outcome.ends_s or 0), seconds, digest)
            self._prune_locked()
            self._wake_locked()
        return seconds

    def _length_locked(self, place, outcome, now):
        rule = outcome.rule
        if outcome.hint_s is not None:
            return outcome.hint_s
        if not rule.doubles_to_s:
            return rule.cooldown_s
        current = self._cooling.get(place)
        if current and current.until > now and current.outcome.rule is rule:
            return current.until - now        # two requests met the same limit: one repeat
        repeats = self._repeats.setdefault(place, {})
        before = repeats.get(rule.name, 0)
        repeats[rule.name] = before + 1
        return min(rule.cooldown_s * 2 ** min(before, 20), rule.doubles_to_s)

    def _left_s(self, cooling):
        """By the clock that says less: one stops in sleep, the other may be set.  Less than
        nothing is how long ago it ended."""
        return min(cooling.until - self._clock(), cooling.until_unix_s - self._now())

    @property
    def is_empty(self):
        """Whether nothing is on record: the usual case, told without the lock."""
        return not (self._cooling or self._strikes or self._repeats)

    def succeeded(self, slot, sent_at):
        """An answer to a request that was sent at `sent_at` proved all that covers the slot, but
        for what an upstream limited since then, and said for how long."""
        if slot.model is None:
            return            # another path's answer proves nothing about messages
        with self._lock:
            for place in slot.places:
                self._prove_locked(place, sent_at)
            self._wake_locked()

    def _prove_locked(self, place, sent_at):
        cooling = self._cooling.get(place)
        if cooling and self._left_s(cooling) > 0 and (
                cooling.began > sent_at and cooling.outcome.hint_s is not None):
            return
        self._forget_locked([place])
        if cooling is None:
            return
        line = self._lines.setdefault(place, Line())
        line.widen()
        if line.allowed < RAMP_END and any(place in slot.places for ticket in self._queue
                                           for slot in ticket.slots):
            self._cooling[place] = cooling._replace(until=self._clock())
        else:
            del self._cooling[place], self._lines[place]

    def clear(self, ref=None, model=None):
        """Ends cooldowns early: all, a key's, or a key and model's.  The number ended."""
        def is_meant(place):
            return ref in (None, place.ref) and model in (None, place.model)
        with self._lock:
            ended = [place for place in self._cooling if is_meant(place)]
            for place in ended:
                del self._cooling[place]
                self._lines.pop(place, None)
            known = {**self._repeats, **self._strikes, **self._asked}
            self._forget_locked(list(filter(is_meant, known)))
            self._wake_locked()
        return len(ended)

    def _forget_locked(self, places):
        """Lets repeats, strikes and hopes of some places begin anew."""
        for place in places:
            for record in (self._repeats, self._strikes, self._asked):
                record.pop(place, None)

    # -- whether something may be tried ----------------------------------------

    def blocking(self, slot, ticket=None):
        """The Cooling that keeps this slot from being tried now; None when it may be tried.

        It may have ended already: then other requests are proving the place, and `ticket` (or
        the caller, who has none) stands behind them.
        """
        with self._lock:
            return self._blocking_locked(slot, ticket)

    def admit(self, slot, token, ticket=None):
        """The same; where it may be tried, `token` is the one that tries, until `leave`."""
        with self._lock:
            cooling = self._blocking_locked(slot, ticket)
            if cooling is None:
                now = self._clock()
                for place in slot.places:
                    if place in self._cooling:
                        self._lines.setdefault(place, Line()).since[token] = now
                if ticket:
                    ticket.slots = frozenset()
                self._wake_locked()
            return cooling

    def leave(self, token):
        """What the token tried was refused, or answered, or given up."""
        if not self._lines:
            return
        with self._lock:
            for line in self._lines.values():
                line.since.pop(token, None)
            self._wake_locked()

    def _blocking_locked(self, slot, ticket):
        entries = [self._cooling[place] for place in slot.places if place in self._cooling
                   and self._left_s(self._cooling[place]) > -UNPROVED_S]
        current = [cooling for cooling in entries if not self._is_over(cooling, ticket)]
        if current:
            return max(current, key=self._left_s)
        return next((cooling for cooling in entries
                     if not self._has_room_locked(cooling.place, ticket)), None)

    def _is_over(self, cooling, ticket):
        """Those who wait for a server look at it again before others are sent there."""
        if ticket and cooling.place.server and self._clock() >= cooling.began + RETRY_S:
            return True
        return self._left_s(cooling) <= 0

    def _has_room_locked(self, place, ticket):
        """Whether one more may try a place whose cooldown is over, and is that the ticket's turn:
        fresh arrivals stand behind all who wait."""
        line = self._lines.get(place)
        room = line.room(self._clock()) if line else 1
        for waiting in self._queue:
            if room <= 0:
                return False
            if waiting is ticket:
                return True
            room -= any(place in slot.places and self._is_free_locked(slot, waiting)
                        for slot in waiting.slots)
        return room > 0

    def _is_free_locked(self, slot, ticket):
        """Whether nothing keeps a ticket from a slot but its place in line."""
        return all(self._is_over(self._cooling[place], ticket)
                   for place in slot.places if place in self._cooling)

    def last_hope(self, slots, in_line=True):
        """The first of the slots that may be tried though it cools: what bars it is something
        that a person may have mended by now, or without `in_line` only others who try it.  None
        where all were asked just now."""
        with self._lock:
            hopes = []
            for order, slot in enumerate(slots):
                bars = [self._cooling[place] for place in slot.places if place in self._cooling
                        and self._left_s(self._cooling[place]) > 0]
                if all(map(self._may_ask_locked, bars)) and (bars or not in_line):
                    asked_at = max(map(self._asked_at_locked, bars), default=-math.inf)
                    hopes.append((asked_at, order, slot, bars))
            if not hopes:
                return None
            *_, slot, bars = min(hopes)
            for cooling in bars:
                count, _ = self._asked.get(cooling.place, (0, 0))
                self._asked[cooling.place] = count + 1, self._clock()
                self.changes += 1
        return slot

    def _asked_at_locked(self, cooling):
        return self._asked.get(cooling.place, (0, cooling.began))[1]

    def _may_ask_locked(self, cooling):
        gaps_s = cooling.outcome.rule.asks_again
        count, _ = self._asked.get(cooling.place, (0, 0))
        return bool(gaps_s) and self._clock() >= (
            self._asked_at_locked(cooling) + gaps_s[min(count, len(gaps_s) - 1)])

    # -- keys that are paid beside their plan ----------------------------------

    def note_paid(self, ref, seconds):
        """Another answer of a key: it is paid beside the plan for these seconds, 0 for not."""
        if seconds:
            self._paid[ref] = self._now() + seconds
        elif self._paid:
            self._paid.pop(ref, None)

    def paid(self):
        """{ref, ...} of the keys whose answers are paid beside their plan now."""
        return {ref for ref, until in self._paid.copy().items() if until > self._now()}

    # -- the queue -------------------------------------------------------------

    def join_queue(self, wake):
        ticket = Ticket(wake)
        with self._lock:
            self._queue.append(ticket)
        return ticket

    def await_slots(self, ticket, slots):
        """From now on the ticket waits for any of these slots."""
        with self._lock:
            ticket.slots = frozenset(slots)
            self._wake_locked()

    def leave_queue(self, ticket):
        with self._lock:
            if ticket in self._queue:
                self._queue.remove(ticket)
                self._wake_locked()

    def seconds_to_turn(self, ticket):
        """(seconds, is_behind): until this ticket may try one of its slots.  0 is now, infinity
        never by itself; behind requests that are proving a place, `wake` may tell earlier."""
        ticket.wake.clear()
        with self._lock:
            now, nearest, is_behind = self._clock(), math.inf, False
            for slot in ticket.slots:
                cooling = self._blocking_locked(slot, ticket)
                if cooling is None:
                    return 0, False
                seconds = self._left_s(cooling)
                if self._is_over(cooling, ticket):
                    is_behind = True
                    line = self._lines.get(cooling.place)
                    since = line.since.values() if line else ()
                    seconds = max(0.0, min(since, default=math.inf) + PROBE_S - now)
                elif not cooling.outcome.rule.waits:
                    seconds = math.inf
                elif cooling.place.server:
                    seconds = min(seconds, cooling.began + RETRY_S - now)
                nearest = min(nearest, seconds)
        return nearest, is_behind

    def wake_all(self):
        with self._lock:
            self._wake_locked()

    def _wake_locked(self):
        self.changes += 1
        for ticket in self._queue:
            ticket.wake.set()

    def _prune_locked(self):
        """Keeps the records bounded: clients may name any number of models."""
        for record in (self._repeats, self._strikes, self._asked, self._lines):
            if len(record) > MAX_COOLDOWNS:
                record.clear()
        if len(self._cooling) > MAX_COOLDOWNS:
            by_end = sorted(self._cooling, key=lambda place: self._cooling[place].until)
            for place in by_end[:MAX_COOLDOWNS // 2]:
                del self._cooling[place]

    # -- what is reported ------------------------------------------------------

    def remaining_s(self, cooling):
        """(seconds until it may be tried again, seconds until the limit itself ends)."""
        left_s = max(0.0, self._left_s(cooling))
        return left_s, max(left_s, cooling.resets_unix_s - self._now())

    def snapshot(self):
        """[(Cooling, seconds left), ...] of all that cools now, the earliest return first."""
        with self._lock:
            current = [(c, self._left_s(c)) for c in self._cooling.values()]
        return sorted((pair for pair in current if pair[1] > 0), key=lambda pair: pair[1])

    def queue_length(self):
        with self._lock:
            return len(self._queue)

    def report_state(self) -> dict:
        """What cools, as JSON values by the wall clock."""
        with self._lock:
            unix_s, offset_s = self._now(), self._now() - self._clock()
            return {'paid': list(self._paid.copy().items()), 'cooldowns': [
                {**c._asdict(), 'key': c.key.ref, 'began': c.began + offset_s,
                 'until': unix_s + self._left_s(c), 'outcome': (
                     c.outcome.rule.name, c.outcome.status, redact(c.outcome.message)[:300],
                     c.outcome.hint_s, c.outcome.limit_fields),
                 'repeats': dict(self._repeats.get(place, {})),
                 'asked': (self._asked.get(place, (0,))[0], self._asked_at_locked(c) + offset_s)}
                for place, c in self._cooling.items() if self._left_s(c) > 0]}

    def restore(self, saved: dict, keys: dict[str, Key]) -> None:
        """Takes back what cools yet.  Its times are kept, so what is old may be asked at once."""
        now, unix_s, cooling, repeats, asked = self._clock(), self._now(), {}, {}, {}
        for entry in saved['cooldowns']:
            name, status, message, hint_s, fields = entry['outcome']
            key, place = keys.get(entry['key']), Slot(*map(text_or_none, entry['place']))
            rule, length_s = key and find_cooling_rule(key.provider, name), entry['length_s']
            age_s = max(0.0, unix_s - entry['began'])     # less than 0: the clock was set back
            left_s = min(entry['until'] - unix_s, length_s - age_s)
            if not (key and rule and place.ref in (None, key.ref)
                    and 0 < left_s <= length_s <= ABSURD_HINT_S):
                continue
            outcome = Outcome(rule, int(status), str(message), hint_s, limit_fields=tuple(
                (str(name), str(value)) for name, value in fields))
            resets_unix_s = min(unix_s + ABSURD_HINT_S, entry['resets_unix_s'])
            cooling[place] = Cooling(key, place, outcome, now - age_s, now + left_s,
                                     unix_s + left_s, resets_unix_s, length_s,
                                     text_or_none(entry['digest']))
            repeats[place] = {name: int(count) for name, count in entry['repeats'].items()}
            count, when = entry['asked']
            asked[place] = int(count), now - max(0.0, unix_s - when)
        paid = {ref: float(until) for ref, until in saved['paid'] if ref in keys}
        with self._lock:
            self._cooling, self._repeats, self._asked, self._paid = cooling, repeats, asked, paid
            self._prune_locked()


class Prospect(NamedTuple):
    """Who would answer a request that came now."""
    state: str                # 'ready'; 'cooling': `attempt` is back first; 'unusable': nobody
    attempt: Attempt | None = None
    back_s: float | None = None       # until a cooling attempt may be made
    passed: tuple = ()        # the attempts before a ready one, in the plan's order
    next: Attempt | None = None       # the ready one behind it


CLIENTS_OWN = Key(CLIENT_REF, CLIENT_REF, ANTHROPIC, '', CLIENT_REF)


def who_serves(config, profile, model, cooling, unusable=(), was_seen=False):
    """The Prospect of a model (None: of any), by the plan and by what cools.

    `cooling` is a snapshot of Cooldowns, `unusable` the refs of keys without a token.  The
    client's own login counts where one `was_seen`, and where nothing else is planned; one
    that cools stands for all.
    """
    models = model_chain(config.model_fallback, model) or [None]
    own = next((c.key for c, _ in cooling if c.key.id == CLIENT_REF), CLIENTS_OWN)
    own = own if uses_clients_own(config, profile) else None
    plan = plan_attempts(config, profile, models, own if was_seen else None)
    attempts = sum(plan if any(plan) else plan_attempts(config, profile, models, own), [])
    left = {c.place: (left_s, c.outcome.rule.waits) for c, left_s in cooling}
    slots = [Slot(a.key.ref, a.model, server=find_target(config, a.key, '', None).base_url)
             for a in attempts]
    ends = [max(left.get(place, (0, True)) for place in slot.places)
            for slot in slots]        # [(seconds left, whether it is back by itself), ...]
    usable = [place for place, a in enumerate(attempts) if a.key.ref not in unusable]
    if not usable:
        return Prospect('unusable')
    ready = [place for place in usable if not ends[place][0]]
    if ready:
        passed, following = attempts[:ready[0]], [attempts[place] for place in ready[1:2]]
        return Prospect('ready', attempts[ready[0]], None, tuple(passed), *following)
    first = min(usable, key=lambda place: (not ends[place][1], ends[place][0]))
    return Prospect('cooling', attempts[first], ends[first][0])


# ==============================================================================
# Conversations
# ==============================================================================
# Where conversations are warm: which key holds the prompt cache of which, and how busy each key
# is.  Knows digests, never a word of a prompt.

#: Conversations that are remembered, each with each model that it asks for.
MAX_CONVERSATIONS = 10_000
#: A conversation that fell back to a lower model stays there for so long: each change of model
#: writes the cache anew.
FALLBACK_STAY_S = 60
#: The time in which a key's load is counted.
LOAD_S = 60


class Warm(NamedTuple):
    """Where a conversation was served last, for one model that it asks for."""
    ref: str
    model: str                # that answered
    until: float              # the cache lives so long; on Conversations' clock
    tokens: int               # of its prompt, as far as an answer told
    since: float              # at this key and model
    client: str = ''          # its family: 'claude-code', 'python-sdk' ...
    turns: int = 0
    moves: int = 0
    read: int = 0             # tokens from the cache, and written to it, all in all
    written: int = 0
    why: str = 'new'          # it is where it is


#: A value of each type that a Warm has.
NO_WARM = Warm('', '', 0.0, 0, 0.0)._asdict()


class Conversations:
    """(conversation's digest, asked model) -> Warm, the latest used last; and each key's load."""

    def __init__(self, clock=time.monotonic, now=time.time):
        self._clock, self._now = clock, now
        self._lock = threading.Lock()
        self.changes = 0              # counts what changed the report of the state
        self._warm = {}
        self._loads = {}              # key's ref -> deque of (when, prompt tokens)
        self._proved = {}             # model -> when it answered last
        self._troubled = {}           # model -> since when it is overloaded

    def find(self, digest, model):
        """The Warm of a conversation for a model; None where it is new, or its cache is gone."""
        if not digest:
            return None
        warm = self._warm.get((digest, model))
        return warm if warm and warm.until > self._clock() else None

    def committed(self, digest, asked, attempt, why, lifetime_s, client):
        """An attempt answers a turn of a conversation."""
        now = self._clock()
        with self._lock:
            self.changes += 1
            remember(self._proved, attempt.model, now, MAX_CONVERSATIONS)
            self._troubled.pop(attempt.model, None)
            if not digest:
                return
            old = self._warm.pop((digest, asked), None)
            place = attempt.key.ref, attempt.model
            if old and (old.ref, old.model) == place:
                since = old.since if why == 'order' else now      # it fell back once more
                warm = old._replace(until=now + lifetime_s, turns=old.turns + 1, since=since)
            else:
                moves = old.moves + (old.until > now) if old else 0
                warm = Warm(*place, now + lifetime_s, old.tokens if old else 0, now, client,
                            (old.turns if old else 0) + 1, moves, old.read if old else 0,
                            old.written if old else 0, why)
            remember(self._warm, (digest, asked), warm, MAX_CONVERSATIONS)

    def finished(self, digest, asked, ref, usage):
        """The usage of an answer: what its prompt took of the key's limits, and where it stood."""
        read = usage.get('cache_read_input_tokens', 0)
        written = usage.get('cache_creation_input_tokens', 0)
        fresh = usage.get('input_tokens', 0) + written
        with self._lock:
            load = self._loads.setdefault(ref, collections.deque(maxlen=1000))
            load.append((self._clock(), fresh))
            warm = self._warm.get((digest, asked))
            if warm and warm.ref == ref:
                self._warm[digest, asked] = warm._replace(
                    tokens=fresh + read or warm.tokens, read=warm.read + read,
                    written=warm.written + written)

    def note_trouble(self, model: str) -> None:
        """A model was overloaded."""
        with self._lock:
            remember(self._troubled, model, self._troubled.get(model, self._clock()),
                     MAX_CONVERSATIONS)

    def troubled_s(self, model: str) -> float:
        """For how long a model has been overloaded without an answer to anyone."""
        return self._clock() - self._troubled.get(model, math.inf)

    def was_proved_since(self, model, since):
        """Whether a model answered anyone after a time."""
        return self._proved.get(model, -math.inf) > since

    def load(self, ref):
        """(conversations that are warm at a key, prompt tokens of the last LOAD_S)."""
        now = self._clock()
        with self._lock:
            count = len({digest for (digest, _), warm in self._warm.items()
                         if warm.ref == ref and warm.until > now})
            tokens = sum(t for when, t in self._loads.get(ref, ()) if now - when < LOAD_S)
        return count, tokens

    def snapshot(self):
        """[(digest, asked model, Warm, seconds that its cache lives), ...], the latest first."""
        now = self._clock()
        with self._lock:
            return [(digest, asked, warm, max(0.0, warm.until - now))
                    for (digest, asked), warm in reversed(list(self._warm.items()))]

    def report_state(self) -> dict:
        """Who is warm where, as JSON values by the wall clock."""
        with self._lock:
            known = list(self._warm.items())      # what follows holds nobody up
        now, offset_s = self._clock(), self._now() - self._clock()
        return {'conversations': [
            {**w._asdict(), 'digest': digest, 'asked': asked, 'until': w.until + offset_s,
             'since': w.since + offset_s} for (digest, asked), w in known if w.until > now]}

    def restore(self, saved: dict, keys: dict[str, Key]) -> None:
        """Takes back who is warm yet."""
        now, offset_s = self._clock(), self._now() - self._clock()
        known = {}
        for entry in saved['conversations'][-MAX_CONVERSATIONS:]:
            warm = Warm(**{name: type(value)(entry[name]) for name, value in NO_WARM.items()})
            until, since = warm.until - offset_s, min(now, warm.since - offset_s)
            if warm.ref in keys and now < until < now + ABSURD_HINT_S:
                place = str(entry['digest']), text_or_none(entry['asked'])
                known[place] = warm._replace(until=until, since=since)
        with self._lock:
            self._warm = known


# ==============================================================================
# Journal
# ==============================================================================
# What happened: the log file, the counters, the recent requests.  Nothing here may stop a
# request: a full disk costs log lines, not answers.

LEVELS = ('debug', 'info', 'warn', 'error')
LINE_ENCODER = json.JSONEncoder(default=str)
#: Log lines that may wait to be written, and how long they wait, so that many go together.
MAX_LOG_LINES = 10_000
MAX_LOG_BATCH = 32
LOG_DELAY_S = 0.05
#: How much of the log's end is read to show its last lines: some 1,000 of them.
LOG_TAIL_BYTES = 512 * 1024
#: Requests that /health lists.
RECENT_REQUESTS = 100
#: The minutes of which the dashboard draws a picture, and the times to first byte kept of one.
HISTORY_MINUTES = 60
MAX_TTFBS = 500
#: News that may wait for one dashboard: some seconds of a busy log.
MAX_NEWS = 1000
OUTCOMES = ('answered', 'failed', 'refused', 'client_gone')


class Subscription:
    """News that one dashboard has not read yet: ('log', JSON text), ...  One that does not keep
    up is dropped, never waited for."""

    def __init__(self):
        self._news = queue.Queue(MAX_NEWS)
        self.is_over = False

    def offer(self, event, text):
        try:
            self._news.put_nowait((event, text))
        except queue.Full:
            self.is_over = True

    def next(self, seconds: float) -> tuple[str, str] | None:
        """The next piece of news, or None when none comes in that time."""
        with contextlib.suppress(queue.Empty):
            return self._news.get(timeout=seconds)
        return None


class EventBus:
    """Passes news on to the dashboards that are open."""

    def __init__(self):
        self._lock = threading.Lock()
        #: Replaced whole, so that publishers need no lock.
        self.subscriptions: tuple[Subscription, ...] = ()

    def publish(self, event: str, text: str) -> None:
        for subscription in self.subscriptions:
            subscription.offer(event, text)

    @contextlib.contextmanager
    def subscription(self) -> Iterator[Subscription]:
        subscription = Subscription()
        with self._lock:
            self.subscriptions += (subscription,)
        try:
            yield subscription
        finally:
            with self._lock:
                self.subscriptions = tuple(s for s in self.subscriptions if s is not subscription)


class JsonLog:
    """One JSON object a line, rotated to PATH.1 at `max_bytes`.  After `start` a thread of its
    own writes, a batch at a time: a write for each request, under one lock, would make all
    requests wait in line (a third of their throughput)."""

    def __init__(self, path: str, level='info', max_bytes=5_242_880, now=time.time,
                 bus: EventBus | None = None):
        self.path, self._now, self._bus = path, now, bus or EventBus()
        self._lock = threading.Lock()             # held for appending and rotating
        self._records = collections.deque(maxlen=MAX_LOG_LINES)       # that wait
        self._has_records = threading.Event()
        self._file = None
        self._is_started = self.failed = False    # failed: the last lines could not be written
        self.configure(level, max_bytes)

    def configure(self, level: str, max_bytes: int) -> None:
        self._least, self._max_bytes = LEVELS.index(level), max_bytes

    def start(self) -> None:
        self._is_started = True
        threading.Thread(target=self._run, name='log', daemon=True).start()

    def write(self, level: str, event: str, **fields) -> None:
        """Logs one line.  Levels: `error` needs a person, `warn` was handled, `info` is a
        change or a finished request, `debug` is for developers."""
        if not self._add(level, event, fields):
            return
        if not self._is_started:
            self.flush()
        elif not self._has_records.is_set():
            self._has_records.set()

    def _add(self, level, event, fields):
        """Whether a record is one to be logged; then it waits for the next flush."""
        if LEVELS.index(level) < self._least:
            return False
        moment = fields.pop('time', None) or utc_text(self._now())
        self._records.append({'time': moment, 'level': level, 'event': event, **fields})
        return True

    def _run(self):
        while True:
            self._has_records.wait()
            time.sleep(LOG_DELAY_S)
            self._has_records.clear()
            self.flush()

    def flush(self) -> None:
        """Writes all records that wait; in small batches, for encoding lets no request run."""
        with self._lock:
            while self._records:
                count = min(len(self._records), MAX_LOG_BATCH)
                batch = [self._records.popleft() for _ in range(count)]
                lines = redact('\n'.join(map(LINE_ENCODER.encode, batch)))
                for line in lines.split('\n') if self._bus.subscriptions else ():
                    self._bus.publish('log', line)
                try:
                    self._append_locked(f'{lines}\n'.encode())
                    self.failed = False
                except OSError:       # a full disk must not stop a request; /health shows it
                    self.failed = True
                    with contextlib.suppress(OSError):    # then one line stays cut
                        if self._file:
                            self._file.truncate(self._size)
                    self._close_locked()

    def _append_locked(self, data):
        if not self._file:
            make_private_folder(os.path.dirname(self.path))
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            self._file = os.fdopen(descriptor, 'ab', buffering=0)
            self._size = os.fstat(descriptor).st_size
            self._make_private_locked()
        left = memoryview(data)
        while left:                   # a disk that is nearly full takes a part of it
            left = left[self._file.write(left):]
        self._size += len(data)
        if self._size >= self._max_bytes:
            self._close_locked()
            os.replace(self.path, self.path + '.1')

    def _make_private_locked(self):
        """Takes older logs from other users' reach, and their folder where it holds only them."""
        folder, name = os.path.split(self.path)
        stem = os.path.splitext(name)[0]
        for path in (self.path, f'{self.path}.1', folder):
            with contextlib.suppress(OSError):    # it is not there, or another owner's
                if path == folder and (os.path.islink(path) or not all(
                        other.startswith(stem) for other in os.listdir(path))):
                    continue
                mode = make_private(path)
                if mode:
                    self._add('warn', 'made_private', {'path': path, 'mode': f'{mode:o}'})

    def _close_locked(self):
        if self._file:
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Writes what waits.  What comes later is dropped: its folder may be gone."""
        self.flush()
        with self._lock:
            self._records = collections.deque(maxlen=0)
            self._close_locked()

    debug = functools.partialmethod(write, 'debug')
    info = functools.partialmethod(write, 'info')
    warn = functools.partialmethod(write, 'warn')
    error = functools.partialmethod(write, 'error')


def last_lines(path, count):
    """The last lines of a log, its rotated file's before its own; at most LOG_TAIL_BYTES."""
    lines = []
    for name in (path, path + '.1'):
        with contextlib.suppress(OSError), open(name, 'rb') as file:       # it is missing
            start = max(0, os.path.getsize(name) - LOG_TAIL_BYTES)
            file.seek(start)
            lines = file.read().splitlines()[bool(start):] + lines     # the first may be cut
        if len(lines) >= count:
            break
    return lines[-count:] if count else []


def last_records(path: str, count: int, level=LEVELS[0]) -> list[dict]:
    """[{'time': ..., 'level': ..., 'event': ...}, ...]: those of the last lines of a log that
    have this level at least."""
    records = []
    for line in last_lines(path, count):
        with contextlib.suppress(ValueError):     # no line of this log
            record = loads_object(line)
            if record.get('level') in LEVELS[LEVELS.index(level):]:
                records.append(record)
    return records


class Minute:
    """What finished in one minute."""

    def __init__(self):
        self.counts = collections.Counter()
        self.ttfbs_ms = []            # as far as MAX_TTFBS

    def add(self, record):
        self.counts[record['outcome']] += 1
        # Answered only because another key or model, or a wait, helped.
        self.counts['rescued'] += record['outcome'] == 'answered' and bool(
            len(record['attempts']) > 1 or record.get('fallback') or record.get('queued_ms'))
        if 'ttfb_ms' in record and len(self.ttfbs_ms) < MAX_TTFBS:
            self.ttfbs_ms.append(record['ttfb_ms'])

    def report(self):
        """{'answered': 5, ..., 'ttfb_p50_ms': 900, 'ttfb_p95_ms': 2000}."""
        counts = {name: self.counts[name] for name in (*OUTCOMES, 'rescued')}
        ordered = sorted(self.ttfbs_ms)
        return {**counts, **{f'ttfb_p{part}_ms': ordered[len(ordered) * part // 100]
                             for part in (50, 95) if ordered}}


#: The windows of a plan; at this use no new conversation begins in one, where another key can.
WINDOWS, NEARLY_SPENT = ('5h', '7d'), 0.98
LONGEST_WINDOW_S = 7 * 86400
ORGANIZATION = 'anthropic-organization-id'
DIGITS = re.compile(r'[0-9]{1,12}')


class Metrics:
    """Counters, the last hour by minutes, the last requests, and each key's latest rate limits."""

    def __init__(self, now=time.time):
        self._now = now
        self._lock = threading.Lock()
        self._counts = collections.Counter()
        self._served_by = collections.Counter()     # key's ref -> answers
        self._recent = collections.deque(maxlen=RECENT_REQUESTS)
        self._minutes = collections.defaultdict(Minute)     # by unix minute, oldest first
        self._limits = {}             # key's ref -> (unix seconds, header fields)
        self._looked = {}             # key's ref -> unix seconds of the last look at them
        self._windows_of = {}         # key's ref -> (header fields, the windows they name)
        self.changes = 0

    def finished(self, record):
        """Counts one finished request by its record in the log."""
        minute = int(self._now() // 60)
        with self._lock:
            self.changes += 1
            counts = self._counts
            counts['requests'] += 1
            counts[record['outcome']] += 1
            counts['input_tokens'] += record.get('input_tokens', 0)
            counts['output_tokens'] += record.get('output_tokens', 0)
            if len(record['attempts']) > 1:
                keys = {(attempt['provider'], attempt['key']) for attempt in record['attempts']}
                counts['rotations'] += len(keys) - 1
            if 'fallback' in record:
                counts['fallbacks'] += 1
            if 'queued_ms' in record:
                counts['queued'] += 1
            if 'key' in record:
                self._served_by[f'{record["provider"]}:{record["key"]}'] += 1
            self._recent.append(record)
            self._minutes[minute].add(record)
            if len(self._minutes) > HISTORY_MINUTES:
                del self._minutes[next(iter(self._minutes))]

    def note_limits(self, ref, headers, is_refusal=False):
        """Keeps an answer's header fields, if they tell of rate limits; of answers that came
        within a second the first, and each refusal's.  They are read when somebody asks."""
        now = self._now()
        if 0 <= now - self._looked.get(ref, 0) < 1 and not is_refusal:    # below 0: set back
            return
        self._looked[ref] = now
        if tells_limits(headers):
            _, before = self._limits.get(ref, (None, {}))
            self._limits[ref] = now, {**headers, **family_fields(before, now), **headers}

    def limits(self, ref: str) -> tuple[float | None, list[Limit]]:
        """(unix seconds of the answer, [Limit, ...]) for a key; (None, []) without one."""
        noted, headers = self._limits.get(ref, (None, {}))
        return noted, read_limits(headers, upstream_now(headers, noted))

    def _windows(self, ref):
        """[(used, unix seconds of its end), ...] of a key's windows, as far as they are known."""
        _, headers = self._limits.get(ref, (None, None))
        read_from, windows = self._windows_of.get(ref, (None, ()))
        if read_from is not headers:              # read once: every request asks
            noted, limits = self.limits(ref)
            windows = [(limit.used, (noted or 0) + limit.resets_s) for limit in limits
                       if limit.name in WINDOWS and limit.resets_s]
            self._windows_of[ref] = headers, windows
        return [window for window in windows if window[1] > self._now()]

    def is_nearly_spent(self, ref: str) -> bool:
        """Whether what is left of a window is for the conversations that are there."""
        return any(used >= NEARLY_SPENT for used, _ in self._windows(ref))

    def window_end(self, ref: str) -> float:
        """When the first window with quota left ends, in unix seconds: that is lost then."""
        return min((end for used, end in self._windows(ref) if used < NEARLY_SPENT),
                   default=math.inf)

    def token_limit(self, ref: str) -> int:
        """The input tokens a minute that a key may use, where its answers say so; else 0."""
        _, headers = self._limits.get(ref, (None, {}))
        limit = headers.get('anthropic-ratelimit-input-tokens-limit', '')
        return int(limit) if DIGITS.fullmatch(limit) else 0

    def organization(self, ref: str) -> str | None:
        """The organization that a key's answers named; None where none did."""
        return self._limits.get(ref, (None, {}))[1].get(ORGANIZATION)

    def snapshot(self):
        """{'requests': 3, 'answered': 2, ..., 'by_key': {...}} and the recent, newest first."""
        names = ('requests', *OUTCOMES, 'rotations', 'fallbacks', 'queued', 'input_tokens',
                 'output_tokens')
        with self._lock:
            counts = {name: self._counts[name] for name in names}
            by_key, recent = dict(self._served_by), list(reversed(self._recent))
        by_provider = collections.Counter()
        for ref, count in by_key.items():
            by_provider[ref.partition(':')[0]] += count
        return {**counts, 'by_key': by_key, 'by_provider': dict(by_provider)}, recent

    def report_state(self) -> dict:
        """The counters and the rate limits, as JSON values."""
        with self._lock:
            counts, answers = list(self._counts.items()), list(self._served_by.items())
        return {'counters': counts, 'answers': answers, 'limits': [
            (ref, noted, {name: value for name, value in headers.items()
                          if name in ('date', ORGANIZATION) or tells_limits({name: value})})
            for ref, (noted, headers) in list(self._limits.items())]}

    def restore(self, saved: dict, keys: dict[str, Key]) -> None:
        """Takes back what was counted, and the limits whose windows may still be open."""
        now = self._now()
        counts = {str(name): int(count) for name, count in saved['counters']}
        answers = {ref: int(count) for ref, count in saved['answers'] if ref in keys}
        limits = {ref: (min(now, noted), {str(name): str(fields[name]) for name in fields})
                  for ref, noted, fields in saved['limits']
                  if ref in keys and now - noted < LONGEST_WINDOW_S}
        with self._lock:
            self._counts, self._served_by = map(collections.Counter, (counts, answers))
            self._limits = limits

    def history(self) -> list[dict]:
        """[{'minute': unix seconds, 'answered': 5, ...}, ...] of the last hour's minutes in which
        something finished."""
        first = int(self._now() // 60) - HISTORY_MINUTES
        with self._lock:
            return [{'minute': minute * 60, **of_minute.report()}
                    for minute, of_minute in self._minutes.items() if minute > first]


class Journal:
    """The log, the counters and the dashboards together: where finished requests go."""

    def __init__(self, log: JsonLog, metrics: Metrics, bus: EventBus | None = None, now=time.time):
        self.log, self.metrics, self._bus, self._now = log, metrics, bus or EventBus(), now

    def finished(self, record: dict) -> None:
        record['time'] = utc_text(self._now())
        self.metrics.finished(record)
        if self._bus.subscriptions:
            self._bus.publish('request', redact(LINE_ENCODER.encode(record)))
        self.log.write('warn' if record['outcome'] == 'failed' else 'info', 'request', **record)


def describe_record(record: dict) -> str:
    """A log line's fields as a person reads them, without time, level and event."""
    if record.get('event') == 'request':
        return describe_request(record)
    return printable(' '.join(
        f'{name}={value if isinstance(value, str) else json.dumps(value)}'
        for name, value in record.items()
        if value not in (None, '') and name not in ('time', 'level', 'event')))


def local_time(text: object) -> str:
    """'2026-03-01T12:00:00.123Z' -> '2026-03-01 13:00:00' where the clock shows that."""
    try:
        moment = datetime.fromisoformat(str(text).replace('Z', '+00:00'))
        return moment.astimezone().strftime('%Y-%m-%d %H:%M:%S')
    except (ValueError, OverflowError, OSError):
        return printable(text)[:19]


def describe_request(record):
    """'POST /v1/messages claude-opus-5-5 200 in 1234 ms: personal 429 -> work 200'."""
    parts = (record.get('method'), record.get('path'),
             record.get('fallback') or record.get('model'),
             record.get('status') or record.get('outcome'), f'in {record.get("duration_ms")} ms')
    text = ' '.join(str(part) for part in parts if part)
    attempts = list(map(as_dict, as_list(record.get('attempts'))))
    if attempts:
        text += ': ' + ' -> '.join(f'{a.get("key")} {a.get("status") or a.get("result")}'
                                   for a in attempts)
    for name, words in (('cache_read_input_tokens', 'tokens read from the cache'),
                        ('cache_creation_input_tokens', 'written to it')):
        text += f', {record[name]} {words}' if record.get(name) else ''
    if record.get('moved_because'):
        text += f', conversation {record.get("conversation")} moved: {record["moved_because"]}'
    if record.get('error') or record.get('outcome') == 'client_gone':
        text += f' ({record.get("error") or "the client left"})'
    return printable(text)


# ==============================================================================
# Configuration store
# ==============================================================================

class ConfigStore:
    """The configuration file: `current` is the Config in force, `update` the only writer."""

    def __init__(self, path: str):
        self.path = path
        self.current = parse_config({})
        self.problem: str | None = None       # why the file as it is now is not in force
        self._notices = []            # what was done to the file that its owner should know
        self._lock = threading.Lock()
        self._signature = None        # of the file that `current` or `problem` came from

    def load(self) -> None:
        """Reads the file; one that is not there means the defaults.  Raises ConfigError."""
        with self._lock:
            self._signature = self._look()
            self.current = self._read()

    def reload_if_changed(self) -> bool:
        """Loads a changed file, if it is right; whether anything changed.  When it is wrong
        the Config in force stays, and `problem` says why."""
        with self._lock:
            signature = self._look()
            if signature == self._signature:
                return False
            self._signature = signature
            if signature is None:
                self.problem = f'{self.path} is gone: the configuration before stays in force.'
                return True
            try:
                config = self._read()
                if config is self.current:        # an editor is just replacing it: look again
                    self._signature = None
                    return False
                self.current, self.problem = config, None
            except ConfigError as error:
                self.problem = str(error)
            return True

    def update(self, edit: Callable):
        """Applies `edit` to the file as it is on disk now, saves the outcome and returns it: an
        edit gives a Config for a Config, or (Config, what else came of it, ...).  Raises
        ConfigError, when the file is wrong too: a broken file is never overwritten.

        The folder is locked against other processes of ours; an editor knows no lock, so the file
        is looked at once more before it is replaced, and the edit done again when it changed."""
        with self._lock, folder_locked(self.path):
            while True:
                signature = self._look()
                outcome = edit(self._read())
                if self._look() == signature:
                    break
            config = outcome if isinstance(outcome, Config) else outcome[0]
            try:
                write_atomically(self.path, dump_config(config))
            except OSError as error:
                raise NotSaved(f'{self.path} could not be written ({error.strerror}): '
                               'nothing was changed.') from error
            if signature is None and self.current.document:
                self._notices.append(f'{self.path} was gone: it is written anew, from the '
                                     'configuration in force and the change to it.')
            self._signature, self.current, self.problem = self._look(), config, None
        return outcome

    def take_notices(self) -> list[str]:
        """[sentence, ...] for the file's owner, each once: what was done to the file."""
        notices, self._notices = self._notices, []
        return notices

    def _look(self):
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f'{self.path} cannot be read ({error.strerror}).') from error
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self):
        """The file's Config; `current` where there is no file: the defaults, if none was read."""
        folder = os.path.dirname(self.path)
        is_usual = folder == os.path.dirname(os.path.expanduser(DEFAULT_CONFIG_PATH))
        if is_usual and not os.path.islink(folder):   # no other that --config or a link names
            self._make_private(folder, folder)
        try:
            with open(self.path, 'rb') as file:
                self._make_private(self.path, file.fileno())
                data = file.read()
        except FileNotFoundError:
            return self.current
        except OSError as error:
            raise ConfigError(f'{self.path} cannot be read ({error.strerror}).') from error
        try:
            return parse_config(json.loads(data.decode('utf-8-sig')))
        except ConfigError as error:
            raise ConfigError(f'{self.path}: {error}') from error
        except json.JSONDecodeError as error:
            raise ConfigError(f'{self.path} is not valid JSON: line {error.lineno}, column '
                              f'{error.colno}: {error.msg}. Correct it there.') from error
        except RecursionError as error:
            raise ConfigError(f'{self.path} is nested too deeply. Correct it.') from error
        except ValueError as error:
            raise ConfigError(f'{self.path} is not valid JSON in UTF-8. Correct it.') from error

    def _make_private(self, path, target):
        """Takes what is at a path, and open as `target`, from other users' reach, and says so."""
        try:
            mode = make_private(target)
            if mode:
                self._notices.append(f'{path} was readable by others (mode {mode:o}); it is '
                                     f'{mode & 0o700:o} now.')
        except FileNotFoundError:     # the folder: there is no configuration yet
            pass
        except OSError:               # another owner's, or a read-only mount
            self._notices.append(f'{path} is readable by others, and that cannot be changed from '
                                 f'here: chmod go= {path}')


def output_path(config_path: str) -> str:
    """Where a process in the background writes what would go to a terminal."""
    return os.path.join(os.path.dirname(config_path), 'logs', f'{PROGRAM}.out')


def log_path(config_path: str) -> str:
    return os.path.join(os.path.dirname(config_path), 'logs', f'{PROGRAM}.log')


# ==============================================================================
# Secrets
# ==============================================================================
# Where the secret of a key is read: from its file or variable, anew each time.

#: Where programs keep a login that `file:PATH` may name: Claude Code's, the Codex CLI's.
TOKEN_FIELDS = (('claudeAiOauth', 'accessToken'), ('tokens', 'access_token'), ('access_token',),
                ('accessToken',), ('OPENAI_API_KEY',))


class TokenUnavailable(Exception):
    """A variable or file without a token, or a login that expired; says which and what to do."""


def read_token(reference: str) -> str:
    """The secret behind a key's token, read anew each time.  Raises TokenUnavailable."""
    kind, _, place = reference.partition(':')
    if kind == 'env':
        token = os.environ.get(place, '').strip()
        reason = f'environment variable {place} is not set'
    elif kind == 'file':
        token, reason = read_token_file(os.path.expanduser(place))
    else:
        return reference
    if not TOKEN.fullmatch(token):
        raise TokenUnavailable(reason)
    return token


def read_token_file(path):
    """(token, why there is none): from a file that holds it alone, or a login's JSON."""
    try:
        with open(path, encoding='utf-8') as file:
            text = file.read(MAX_ERROR_BODY_BYTES).strip()
    except (OSError, UnicodeDecodeError) as error:
        return '', f'file {path} cannot be read ({error_reason(error)})'
    if not text.startswith('{'):
        return text, f'file {path} does not hold a token alone'
    try:
        document = loads_object(text)
    except ValueError:
        return '', f'file {path} is not valid JSON'
    for names in TOKEN_FIELDS:
        found = functools.reduce(lambda value, name: as_dict(value).get(name), names, document)
        if isinstance(found, str) and found:
            return found, f'file {path} holds a token with a space or control character'
    return '', f'file {path} holds no access token'


def read_usable_token(key: Key, now: float) -> str:
    """The secret of a key.  Raises TokenUnavailable: also for a ChatGPT login that has expired,
    or that names no account."""
    token = read_token(key.token)
    if not is_login(key, token):
        return token
    claims = jwt_claims(token)
    follows = 'let the Codex CLI renew it (codex login)'
    if not is_reference(key.token):
        follows += f' and add it as {RUN} add-openai-key file:~/.codex/auth.json'
    expires = claims.get('exp')
    if isinstance(expires, (int, float)) and expires <= now:
        ago = format_duration(now - max(expires, 0))
        raise TokenUnavailable(f'the ChatGPT login expired {ago} ago: {follows}')
    if not account_id(claims):
        raise TokenUnavailable(f'the ChatGPT login names no account: {follows}')
    return token


def server_of(config: Config, key: Key) -> str:
    """The base URL to which a key's requests go; without its token the one for API keys."""
    token = ''
    if key.provider == OPENAI and not key.base_url:       # else the token makes no difference
        with contextlib.suppress(TokenUnavailable):
            token = read_token(key.token)
    return find_target(config, key, token, None).base_url


def secret_digest(token: str) -> str:
    """What stands for a secret where the secret itself must not."""
    return hashlib.sha256(token.encode('utf-8', 'surrogatepass')).hexdigest()[:16]


def has_new_secret(key: Key, digest: str | None) -> bool:
    """Whether the file or variable of a key holds another secret than the one of this digest."""
    if not (digest and is_reference(key.token)):
        return False
    try:
        return secret_digest(read_token(key.token)) != digest
    except TokenUnavailable:
        return False


# ==============================================================================
# State
# ==============================================================================
# What a restart does not lose, in a file that is a help and never a need.  What it says is the
# parts' own: each has `report_state() -> {name: [JSON value, ...]}`, `restore(saved, keys)`, which
# leaves out what is not of these keys, and `changes`, a count that tells whether to save.

#: To be raised when the same name comes to mean something else.
STATE_VERSION = 1
#: 10,000 conversations have 3 MB.
MAX_STATE_BYTES = 32 * 1024 * 1024
#: It is saved so often at most, or where that takes long for so small a part of the time.
SAVE_S, SAVING_SHARE = 1, 0.02
BASE_URLS = operator.attrgetter('anthropic_base_url', 'openai_base_url', 'codex_base_url')


def state_path(config_path: str) -> str:
    return os.path.join(os.path.dirname(config_path), 'state.json')


def key_digests(config: Config) -> dict[str, str]:
    """{key's ref: what another token or server under that name would change}."""
    return {ref: secret_digest(json.dumps([key.token, key.base_url, *BASE_URLS(config)]))
            for ref, key in config.keys.items()}


class State:
    """The file, and the parts whose state it keeps."""

    def __init__(self, store: ConfigStore, log: JsonLog, parts: list):
        self.path = state_path(store.path)
        self._store, self._log, self._parts = store, log, parts
        self._lock = threading.Lock()             # held while it is saved
        self._saved = None            # the parts' `changes` that the file knows
        self._failed = False          # it could not be saved
        self.pause_s: float = SAVE_S  # until it may be saved again

    def load(self) -> None:
        """Gives the parts what the file says; from where it cannot be used they begin anew."""
        config = self._store.current
        try:
            saved = self._read(config)
            unchanged = saved['keys'].items() & key_digests(config).items()
            keys = {ref: config.keys[ref] for ref, _ in unchanged}
            for part in self._parts:
                part.restore(saved, keys)
        except FileNotFoundError:
            pass                      # the first start
        except (ArithmeticError, AttributeError, LookupError, OSError, TypeError,
                ValueError) as error:
            self._log.write('warn', 'state_ignored',
                            message=f'{type(error).__name__}: {error}'[:300])
        self._saved = [part.changes for part in self._parts]

    def _read(self, config):
        """The file's object.  Raises OSError, or ValueError for one that is not believed."""
        found = os.stat(self.path)
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_STATE_BYTES:
            raise ValueError('no file, or too big')
        if found.st_mode & 0o077 and os.name != 'nt':     # Windows has no such modes
            raise ValueError('others may read it')
        with open(self.path, 'rb') as file:
            saved = loads_object(file.read())
        if saved.get('version') != STATE_VERSION:
            raise ValueError('of another version')
        if saved['keys'] and not saved['keys'].keys() & config.keys.keys():
            raise ValueError('of another configuration')
        return saved

    def save(self) -> None:
        """Writes the file if anything has changed.  That it cannot be written is logged once."""
        with self._lock:
            changes, began = [part.changes for part in self._parts], time.monotonic()
            if changes == self._saved:
                return
            try:
                write_atomically(self.path, self._dump())
                self._saved, self._failed = changes, False
            except OSError as error:
                if not self._failed:
                    self._log.warn('state_not_saved', path=self.path, message=error.strerror)
                self._failed = True
            self.pause_s = max(SAVE_S, (time.monotonic() - began) / SAVING_SHARE)

    def _dump(self):
        """The file's bytes, encoded entry by entry: encoding lets no request run."""
        digests = json.dumps(key_digests(self._store.current))
        fields = [f'"version": {STATE_VERSION}', f'"keys": {digests}']
        for part in self._parts:
            fields += [f'"{name}": [' + ',\n'.join(map(json.dumps, entries)) + ']'
                       for name, entries in part.report_state().items()]
        return f'{{{", ".join(fields)}}}'.encode()


# ==============================================================================
# Exchanges
# ==============================================================================

#: How often the watcher looks; a client that left is noticed within this.
WATCH_S = 0.25


def readable(sockets: list[socket.socket], seconds: float = 0) -> list[socket.socket]:
    """Those of some sockets that have bytes, an end or an error waiting, or get them in time."""
    if not hasattr(select, 'poll'):               # Windows
        return select.select(sockets, [], [], seconds)[0]
    return polled(sockets, select.POLLIN, seconds)


def has_news(sock):
    """As `readable`, of one socket and faster: each request over a kept connection asks it."""
    if not hasattr(select, 'poll'):               # Windows
        return bool(readable([sock]))
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def departed(sockets) -> list[socket.socket]:
    """Those of some sockets whose peer has closed its side."""
    if not hasattr(select, 'POLLRDHUP'):          # not Linux
        return [sock for sock in readable(sockets) if has_left(sock)]
    return polled(sockets, select.POLLRDHUP)


def polled(sockets, event, seconds: float = 0):
    """Those of some sockets at which an event, or an error, waits or comes in time."""
    poll = select.poll()
    by_number = {sock.fileno(): sock for sock in sockets}
    by_number.pop(-1, None)                       # closed in this moment by its own thread
    for number in by_number:
        poll.register(number, event)
    return [by_number[number] for number, _ in poll.poll(seconds * 1000)]


def has_left(sock):
    """Whether a readable socket's peer has closed it, rather than sent something."""
    try:
        return sock.recv(1, socket.MSG_PEEK | getattr(socket, 'MSG_DONTWAIT', 0)) == b''
    except BlockingIOError:
        return False
    except OSError:
        return True


class Exchange:
    """Both ends of one request, as far as the watcher and the queue must reach them."""

    def __init__(self, client_socket: socket.socket, clock=time.monotonic):
        self.client_socket = client_socket
        self.deadline = math.inf      # on `clock`: the upstream is given up after it
        self.gone = False             # the client left
        self.timed_out = False        # the upstream was given up
        self._clock = clock
        self._wake = self._upstream_socket = None
        self._lock = threading.Lock()

    @property
    def wake(self) -> threading.Event:
        """The Event that ends a pause or a wait in the queue; few requests need it."""
        with self._lock:
            if self._wake is None:
                self._wake = threading.Event()
                if self.gone:
                    self._wake.set()
            return self._wake

    def attach(self, upstream_socket: socket.socket, seconds: float) -> None:
        """From here on the watcher ends this socket when the client leaves or time is up."""
        with self._lock:
            self._upstream_socket = upstream_socket
            self.deadline = self._clock() + seconds
            self.timed_out = False
        self.check()

    def detach(self) -> None:
        with self._lock:
            self._upstream_socket, self.deadline = None, math.inf

    def extend(self, seconds: float) -> None:
        self.deadline = self._clock() + seconds

    def check(self) -> None:
        """Raises ClientGone or UpstreamTimeout when that is why a read or write ended."""
        if self.gone:
            raise ClientGone
        if self.timed_out:
            raise UpstreamTimeout

    def client_left(self):
        self.gone = True
        self.end_upstream()
        self.wake.set()

    def end_upstream(self):
        with self._lock, contextlib.suppress(OSError):        # it may end by itself in this moment
            if self._upstream_socket:
                # Not SSLSocket.shutdown: it would drop the TLS state under a running read.
                socket.socket.shutdown(self._upstream_socket, socket.SHUT_RDWR)


class Watcher:
    """One thread that sees clients leave and upstreams fall silent, while every other thread
    sits in a blocking read.  It costs a request two dictionary operations."""

    def __init__(self, clock=time.monotonic):
        self._clock = clock
        self._exchanges = {}          # id(exchange) -> Exchange
        self._busy = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, name='watcher', daemon=True).start()

    @contextlib.contextmanager
    def watching(self, exchange: Exchange) -> Iterator[Exchange]:
        self._exchanges[id(exchange)] = exchange
        if not self._busy.is_set():
            self._busy.set()
        try:
            yield exchange
        finally:
            del self._exchanges[id(exchange)]

    def __len__(self):
        return len(self._exchanges)

    def _run(self):
        while True:
            self._busy.wait()
            time.sleep(WATCH_S)
            self._busy.clear()        # before the look: what comes after it sets it again
            exchanges = list(self._exchanges.values())
            if exchanges:
                self._busy.set()
                self.sweep(exchanges)

    def sweep(self, exchanges):
        """Ends those of these exchanges whose client left or whose time is up."""
        now = self._clock()
        by_socket = {e.client_socket: e for e in exchanges if not e.gone}
        for sock in departed(by_socket):
            by_socket[sock].client_left()
        for exchange in exchanges:
            if now > exchange.deadline and not exchange.timed_out:
                exchange.timed_out = True
                exchange.end_upstream()


# ==============================================================================
# HTTP messages
# ==============================================================================
# Heads and chunked bodies as both sides read them.  Knows bytes and no socket.

#: A field line as RFC 9110 section 5 has it: no folding, no space before the colon.
FIELD_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
CHUNK_LINE = re.compile(rb'([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?')
LENGTH = re.compile(r'[0-9]{1,18}')
#: Field lines of heads up to this size are kept as read; clients' have some 1.5 KB.
MAX_KNOWN_HEAD_BYTES = 4096


class Field(NamedTuple):
    """A header field, with all that each message needs of it: most came before, and are kept."""
    name: str                 # as sent
    value: str
    entry: tuple              # (lower-case name, value)
    line: str                 # as it goes on to the other side; '' for one that ends here


ENTRY, LINE = (operator.itemgetter(Field._fields.index(name)) for name in ('entry', 'line'))

#: Options that change what becomes of the connection, and of no field.
CONNECTION_OPTIONS = frozenset({'close', 'keep-alive'})


@functools.lru_cache(maxsize=64)
def name_list(value: str) -> frozenset[str]:
    """The names in a Connection field, lower case, or in another like it."""
    return frozenset(name.strip().lower() for name in value.split(',')) - {''}


def split_head(data: bytes, read) -> tuple[str, list[Field], bool]:
    """(first line, [Field, ...], whether every field line is well-formed); lines that are not
    are left out.  `read` is a side's cached read_field."""
    first, *lines = data.decode('latin-1').split('\r\n')
    if len(data) > MAX_KNOWN_HEAD_BYTES:
        read = read.__wrapped__       # what is kept must not grow large
    fields = list(filter(None, map(read, lines)))
    return first, fields, len(fields) == len(lines)


def read_field(line: str, goes_on: Callable) -> Field | None:
    """The Field in a line; None when it is malformed.  `goes_on(name)`: is it forwarded?"""
    match = FIELD_LINE.fullmatch(line)
    if not match:
        return None
    name, value = match.group(1), match.group(2).rstrip(' \t')
    forwarded = f'{name}: {value}\r\n' if goes_on(name.lower()) else ''
    return Field(name, value, (name.lower(), value), forwarded)


def join_fields(fields: list[Field]) -> dict[str, str]:
    """{lower-case name: value}.  Repeated fields are joined, so that a second Host or
    Content-Length makes a value that no strict pattern accepts."""
    entries = list(map(ENTRY, fields))
    headers = dict(entries)
    if len(headers) < len(entries):
        headers = {}
        for name, value in entries:
            headers[name] = f'{headers[name]}, {value}' if name in headers else value
    return headers


def forwarded_lines(fields: list[Field], headers: dict[str, str]) -> str:
    """The lines of those fields that go on, as text."""
    named_by_connection = name_list(headers.get('connection', ''))
    if named_by_connection <= CONNECTION_OPTIONS:     # nearly always
        return ''.join(map(LINE, fields))
    return ''.join([field.line for field in fields if field.entry[0] not in named_by_connection])


class BadChunks(Exception):
    """A chunked body is malformed, or over a limit."""


class ChunkReader:
    """Takes a body out of its chunks (RFC 9112 section 7.1), in whatever pieces they come."""

    def __init__(self, max_bytes=sys.maxsize, max_chunks=sys.maxsize):
        self.rest = b''               # fed, not yet used; at the end what stands behind the body
        self._left = 0                # bytes to come of the current chunk
        self.ended = self._is_at_chunk_end = self._in_trailers = False
        self.bytes_allowed, self._max_chunks = max_bytes, max_chunks      # below 0: too large
        self._chunks = self._trailers = 0     # so far, the empty ones at their end too

    def feed(self, data: bytes) -> bytes:
        """The body's bytes in all that has come, joined.  Raises BadChunks."""
        data, position, pieces = self.rest + data if self.rest else data, 0, []
        while not self.ended:
            if self._left:
                piece = data[position:position + self._left]
                pieces.append(piece)
                position += len(piece)
                self._left -= len(piece)
                if self._left:
                    break
                self._is_at_chunk_end = True
            if self._is_at_chunk_end:
                if not data.startswith(b'\r\n', position):
                    if len(data) < position + 2:
                        break
                    raise BadChunks('a chunk of the body does not end where its size says')
                position, self._is_at_chunk_end = position + 2, False
            end = data.find(b'\r\n', position)
            if end < 0:
                if len(data) - position > MAX_LINE_BYTES:
                    raise BadChunks('a line of a chunked body is too long')
                break
            self._note_line(data[position:end])
            position = end + 2
        self.rest = data[position:]
        return pieces[0] if len(pieces) == 1 else b''.join(pieces)

    def _note_line(self, line):
        """A line before a chunk: its size; or behind the last: a trailer, which is not used."""
        if self._in_trailers:
            self.ended = not line
            self._trailers += 1
            if self._trailers >= MAX_FIELDS and line:
                raise BadChunks('the body has too many trailers')
            return
        match = CHUNK_LINE.fullmatch(line)
        if not match:
            raise BadChunks('the size of a chunk must be a hexadecimal number')
        self._left = int(match[1], 16)
        self._in_trailers = not self._left
        self.bytes_allowed -= self._left
        if self.bytes_allowed < 0:
            raise BadChunks('the body is too large')
        self._chunks += 1
        if self._left and self._chunks >= self._max_chunks:
            raise BadChunks(f'the body has more than {self._max_chunks} chunks')


# ==============================================================================
# Client connections
# ==============================================================================
# Requests are read by RFC 9112 and nothing looser: what this proxy and a server behind it
# could read differently is refused (request smuggling), with a 4xx and a closed connection.

METHODS = ('GET', 'POST', 'PUT', 'PATCH', 'DELETE', 'HEAD', 'OPTIONS')
REQUEST_LINE = re.compile(r'([A-Z]{1,16}) ([!-~]+) HTTP/1\.([01])')
BARE_LF = re.compile(rb'(?<!\r)\n')
#: How an API path begins: clients put a base URL that ends in /v1, in / or in neither before it.
API_PATH = re.compile(r'/+(?:(?:v1/+)+|(?=(?:messages|models|files|complete)(?:[/?]|$)))')
DOT_SEGMENT = re.compile(r'(?i)(?:^|/|%2f|%5c)(?:\.|%2e){1,2}(?=/|%2f|%5c|$)')
#: Not passed upstream as they came: ours to write, or nobody's business (a cookie of
#: another program on this host).  accept-encoding becomes identity: a compressed error
#: cannot be classified, and usage is read from the stream.
OWN_REQUEST_FIELDS = HOP_BY_HOP | {
    'host', 'content-length', 'x-api-key', 'authorization', 'accept-encoding', 'expect',
    'anthropic-beta', 'cookie'}
#: Waiting for a client: each read of a head or body, the whole head, the whole body, between
#: two requests, and for a client that does not read its answer.
CLIENT_READ_S = 20
CLIENT_HEAD_S = 30
CLIENT_BODY_S = 300
CLIENT_IDLE_S = 600
CLIENT_WRITE_S = 300
#: What a body that has not come yet is given at first.
PREPARED_BYTES = 1024 * 1024
#: Chunks of a request body: 32 MB in pieces of 330 bytes.
MAX_CHUNKS = 100_000
#: Of the names under which clients' own keys cool.
CLIENT_SALT = os.urandom(32)


class RequestHead(NamedTuple):
    method: str
    target: str               # path and query; an API path begins with one /v1/
    minor_version: int        # 1 for HTTP/1.1
    fields: list              # [Field, ...] as sent
    headers: dict             # lower-case name -> value; repeated ones joined by ', '
    is_chunked: bool = False
    length: int = 0           # of the body, where it is not chunked

    @property
    def keeps_alive(self):
        options = name_list(self.headers.get('connection', ''))
        return 'close' not in options and (self.minor_version == 1 or 'keep-alive' in options)


read_request_field = functools.lru_cache(maxsize=512)(functools.partial(
    read_field, goes_on=lambda name: name not in OWN_REQUEST_FIELDS and name[:8] != 'x-proxy-'))


def parse_head(data):
    """The RequestHead in the bytes before the blank line.  Raises BadRequest."""
    first, fields, is_well_formed = split_head(data, read_request_field)
    match = REQUEST_LINE.fullmatch(first)
    if not match:
        raise BadRequest('The request line is not one of HTTP/1.0 or HTTP/1.1.')
    if not is_well_formed:
        raise BadRequest('A header field is malformed or folded.')
    if len(fields) > MAX_FIELDS:
        raise BadRequest(f'The request has more than {MAX_FIELDS} header fields.', 431)
    if len(data) > MAX_LINE_BYTES and max(map(len, data.split(b'\r\n'))) > MAX_LINE_BYTES:
        raise BadRequest(f'A line of the request head is over {MAX_LINE_BYTES} bytes.', 431)
    method, target, minor_version = match.groups()
    prefix = API_PATH.match(target)
    if prefix:                        # here, so that the guard and the routes see what goes on
        target = '/v1/' + target[prefix.end():]
    headers = join_fields(fields)
    length = headers.get('content-length', '0')
    if not LENGTH.fullmatch(length):
        raise BadRequest('Content-Length must be one number.')
    head = RequestHead(method, target, int(minor_version), fields, headers,
                       'transfer-encoding' in headers, int(length))
    check_head(head)
    return head


def check_head(head):
    """Raises BadRequest for what must not be forwarded or cannot be framed for certain."""
    if head.method not in METHODS:
        raise BadRequest(f'The method {head.method} is not supported.', 501)
    path = head.target.partition('?')[0]
    if (not path.startswith('/') or path.startswith('//') or '\\' in head.target
            or '#' in head.target or DOT_SEGMENT.search(path)):
        raise BadRequest('The request target must be a path like /v1/messages.')
    if head.is_chunked:
        coding, has_length = head.headers['transfer-encoding'], 'content-length' in head.headers
        if coding.lower() != 'chunked' or has_length or head.minor_version == 0:
            raise BadRequest('Transfer-Encoding may only be "chunked", without Content-Length.')
    if head.headers.get('expect', '100-continue').lower() != '100-continue':
        raise BadRequest('The only expectation known is 100-continue.', 417)


def set_kernel_timeouts(sock, receive_s, send_s):
    """Timeouts kept by the kernel: the socket stays blocking, so that no read polls first
    (a third of a stream's processor time).  An expired one raises BlockingIOError."""
    for option, seconds in ((socket.SO_RCVTIMEO, receive_s), (socket.SO_SNDTIMEO, send_s)):
        value = struct.pack('ll', seconds, 0) if os.name != 'nt' else seconds * 1000
        sock.setsockopt(socket.SOL_SOCKET, option, value)


class ClientConnection:
    """Reads requests from a client's socket."""

    def __init__(self, sock: socket.socket, clock=time.monotonic):
        self.sock, self._clock = sock, clock
        self._buffer = bytearray()    # received, not yet used
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        set_kernel_timeouts(sock, CLIENT_READ_S, CLIENT_WRITE_S)

    def read_head(self) -> RequestHead | None:
        """The next RequestHead; None when the client closed or stayed idle.  Raises
        BadRequest, ClientGone."""
        if not self._wait_for_request():
            return None
        deadline, searched = self._clock() + CLIENT_HEAD_S, 0
        # Only what is new is searched: it may come byte by byte.
        while (end := self._buffer.find(b'\r\n\r\n', max(0, searched - 3))) < 0:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise BadRequest(f'The request head is over {MAX_HEAD_BYTES} bytes.', 431)
            if BARE_LF.search(self._buffer, searched):
                raise BadRequest('Lines of a request head must end in CR LF.')
            searched = len(self._buffer)
            self._buffer += self._receive(deadline, self.sock.recv, RECEIVE_BYTES)
        return parse_head(self._take(end, 4))

    def _take(self, size, skipped=0):
        """The first bytes received; some more are skipped."""
        data = bytes(self._buffer[:size])
        del self._buffer[:size + skipped]
        return data

    def _wait_for_request(self):
        deadline = self._clock() + CLIENT_IDLE_S
        while True:
            while self._buffer.startswith(b'\r\n'):    # RFC 9112 section 2.2: it may precede
                del self._buffer[:2]
            if self._buffer[:2] not in (b'', b'\r'):   # half of such a line end
                return True
            if self._clock() > deadline:
                return False
            try:
                if not (data := self.sock.recv(RECEIVE_BYTES)):
                    return False
                self._buffer += data
            except BlockingIOError:
                pass                  # CLIENT_READ_S passed; CLIENT_IDLE_S may not have
            except OSError:
                return False

    def _receive(self, deadline, receive, wanted):
        """What `receive(wanted)` gives, at least a byte.  Raises BadRequest after the deadline,
        ClientGone."""
        try:
            data = receive(wanted)
        except BlockingIOError as error:
            raise BadRequest('The request did not come in time.', 408) from error
        except OSError as error:
            raise ClientGone from error
        if not data:
            raise ClientGone
        if self._clock() > deadline:
            raise BadRequest('The request did not come in time.', 408)
        return data

    def read_body(self, head: RequestHead) -> bytes | bytearray:
        """The body, whole.  Raises BadRequest, ClientGone."""
        deadline = self._clock() + CLIENT_BODY_S
        if head.is_chunked:
            return self._read_chunks(deadline)
        received = self._take(head.length)
        if len(received) == head.length:          # nearly always where it is small
            return received
        # In one place, not in pieces that are joined: with twice the memory the C library would
        # return and fetch it each time.  A length alone costs no more than a megabyte.
        body, count = bytearray(min(head.length, PREPARED_BYTES)), len(received)
        body[:count] = received
        while count < head.length:
            if count == len(body):
                body += bytes(min(count, head.length - count))
            with memoryview(body) as view:
                count += self._receive(deadline, self.sock.recv_into, view[count:])
        return body

    def _read_chunks(self, deadline):
        chunks, body = ChunkReader(MAX_BODY_BYTES, MAX_CHUNKS), bytearray()
        try:
            body += chunks.feed(self._take(len(self._buffer)))
            while not chunks.ended:
                body += chunks.feed(self._receive(deadline, self.sock.recv, RECEIVE_BYTES))
        except BadChunks as error:
            if chunks.bytes_allowed < 0:
                raise too_large() from error
            raise BadRequest(f'{str(error).capitalize()}.') from error
        self._buffer += chunks.rest
        return bytes(body)

    def send(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except OSError as error:
            raise ClientGone from error

    def send_some(self, data):
        """Sends what the client takes without waiting; the number of bytes."""
        try:
            return self.sock.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise ClientGone from error

    def reset(self) -> None:
        """Closes so that the client sees an error, not an end."""
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        self.sock.close()

    def drain(self) -> None:
        """Lets a refused client read its answer: closing on unread bytes would reset it."""
        deadline = self._clock() + 1
        with contextlib.suppress(OSError):        # it may leave without waiting
            self.sock.shutdown(socket.SHUT_WR)
            set_kernel_timeouts(self.sock, 1, 1)
            while self.sock.recv(RECEIVE_BYTES) and self._clock() < deadline:
                pass


def too_large() -> BadRequest:
    message = f'The request body is over {MAX_BODY_BYTES} bytes.'
    return BadRequest(message, 413, 'request_too_large')


REASONS = {**{status.value: status.phrase for status in http.HTTPStatus}, 529: 'Overloaded'}


class ClientResponse:
    """Writes one answer: whole with `send`, or `start`, `write` ..., `finish`.  The commit is the
    first byte that leaves: `started` says whether it did."""

    def __init__(self, connection, head, now=time.time):      # head None: it could not be read
        self._connection, self._now = connection, now
        self._has_body = head is None or head.method != 'HEAD'
        self._minor_version = head.minor_version if head else 0
        self.keep_alive = head.keeps_alive if head else False
        self.started = self._chunked = False
        self.status = None
        self._pending = b''           # a head until the first piece, or what a client did not take
        self._is_unframed = False     # only the connection's end shows the client the body's

    def send(self, status: int, fields: list, body=b'') -> None:
        head = self._head(status, [*fields, ('content-length', len(body))])
        self.started = True
        self._connection.send(head + body if self._has_body else head)

    def start(self, status: int, fields: list, length: int | None = None, forwarded='') -> None:
        """The head of an answer that comes in pieces; `length` of the body when it is known;
        `forwarded` is text of field lines that precede."""
        if length is not None:
            fields = [*fields, ('content-length', length)]
        elif status not in (204, 304):
            self._chunked = self._minor_version == 1
            fields = [*fields, ('transfer-encoding', 'chunked')] if self._chunked else fields
            self._is_unframed = not self._chunked
            self.keep_alive = self.keep_alive and self._chunked
        self._pending = self._head(status, fields, forwarded)
        self.started = True

    def write(self, data: bytes) -> None:
        if data and self._has_body:
            self._pending += self._framed(data)
            self.flush()

    def _framed(self, data):
        return b'%x\r\n%b\r\n' % (len(data), data) if self._chunked else data

    def flush(self) -> None:
        if self._pending:
            data, self._pending = self._pending, b''
            self._connection.send(data)

    def offer(self, data: bytes) -> bool:
        """Writes what the client takes without waiting; whether that was all."""
        if data and self._has_body:
            data = self._pending + self._framed(data)
            self._pending = data[self._connection.send_some(data):]
        return not self._pending

    def finish(self) -> None:
        self._pending += b'0\r\n\r\n' if self._chunked and self._has_body else b''
        self.flush()

    def abandon(self) -> None:
        """Ends an answer that is not complete: the connection closes without the last chunk,
        so that no client takes it for whole."""
        self.keep_alive = False
        if self.started and self._is_unframed:
            self._connection.reset()

    def _head(self, status, fields, forwarded=''):
        self.status = status
        # RFC 9110 section 6.6.1: who answers says when.
        if not (forwarded or any(name.lower() == 'date' for name, _ in fields)):
            fields = [('date', http_date(int(self._now()))), *fields]
        # Fields come from upstreams that were read strictly and from header_text: no CR, no LF.
        lines = ''.join([f'{name}: {value}\r\n' for name, value in fields])
        close = '' if self.keep_alive else 'connection: close\r\n'
        return (f'HTTP/1.1 {status} {REASONS.get(status, "Unknown")}\r\n{forwarded}{lines}{close}'
                '\r\n').encode('latin-1', 'replace')


#: What clients call themselves, and their family.
CLIENT_FAMILIES = (('claude-cli', 'claude-code'), ('anthropic/python', 'python-sdk'),
                   ('anthropic/js', 'node-sdk'), ('aider', 'aider'), ('litellm', 'aider'),
                   ('cline', 'cline'), ('opencode', 'opencode'), ('ai-sdk', 'ai-sdk'),
                   ('curl/', 'curl'))


@functools.lru_cache(maxsize=64)
def client_family(user_agent):
    name = user_agent.lower()
    return next((family for mark, family in CLIENT_FAMILIES if mark in name), 'other')


class ClientRequest:
    """A request that is to be answered by an upstream."""

    def __init__(self, head: RequestHead, body: bytes | bytearray, profile_name: str,
                 access_token: str | None = None):
        path = head.target.partition('?')[0]
        self.method, self.path, self.target = head.method, path, head.target
        self.is_message = path == MESSAGES_PATH and head.method == 'POST'
        self.is_read = head.method in ('GET', 'HEAD')
        #: Whether the answer may hold the id of something that was made: a batch, a file.
        self.may_make = head.method == 'POST' and path not in (
            MESSAGES_PATH, COUNT_TOKENS_PATH, '/v1/complete')
        self.body = RequestBody(body)
        self.has_body = bool(body) or head.is_chunked or 'content-length' in head.headers
        self.profile_name = profile_name
        betas = head.headers.get('anthropic-beta', '').split(',')
        self.betas = [beta.strip() for beta in betas if beta.strip()]
        #: [(field, value), ...] of the client's own credential, not of the access token.
        fields = [(name, head.headers.get(name)) for name in ('x-api-key', 'authorization')]
        self.credentials = [(name, value) for name, value in fields
                            if value and not (access_token and presents(value, access_token))]
        self.session_field = head.headers.get(SESSION_FIELD)
        self.client = client_family(head.headers.get('user-agent', ''))
        #: The field lines that every attempt sends, as text.
        self.forwarded_head = forwarded_lines(head.fields, head.headers)

    @functools.cached_property
    def conversation_digest(self) -> str | None:
        """What its conversation is known by; None of a request that belongs to none."""
        if not self.is_message:
            return None
        return conversation_digest({SESSION_FIELD: self.session_field}, self.body.data)

    @functools.cached_property
    def feature(self) -> str | None:
        """What is asked for that has limits of its own: 'fast', '1m', or None."""
        if b'"speed"' in self.body.data and self.body.json.get('speed') == 'fast':
            return 'fast'
        return '1m' if any(beta.startswith('context-1m') for beta in self.betas) else None

    @functools.cached_property
    def conversation(self) -> Conversation:
        """The request as it is translated.  Raises Untranslatable."""
        return read_conversation(self.body.json)

    @functools.cached_property
    def claude_body(self) -> RequestBody:
        """The body without thinking that Anthropic did not sign; to look for it takes
        milliseconds where it is a megabyte."""
        if not (self.is_message or self.path == COUNT_TOKENS_PATH):
            return self.body
        data = drop_unsigned_thinking(self.body.data)
        return self.body if data is self.body.data else RequestBody(data)

    @functools.cached_property
    def client_key(self) -> Key | None:
        """The client's own credential as a Key, None when it sent none.  It cools under a name
        that reveals nothing of it: a hash with a salt of this process."""
        if not self.credentials:
            return None
        secret = '\n'.join(value for _, value in self.credentials)
        digest = hashlib.blake2b(secret.encode(), key=CLIENT_SALT, digest_size=12).hexdigest()
        return Key(f'client:{digest}', CLIENT_REF, ANTHROPIC, '', CLIENT_REF)


def presents(value: str, access_token: str) -> bool:
    """Whether a field's value is the access token, bare or as Bearer; in constant time."""
    given = value.encode('latin-1')
    if given[:7].lower() == b'bearer ':
        given = given[7:].strip()
    return hmac.compare_digest(given, access_token.encode())


# ==============================================================================
# Upstream
# ==============================================================================

STATUS_LINE = re.compile(r'HTTP/1\.([01]) ([1-5][0-9][0-9])(?: .*)?')
ODD_LENGTH = re.compile(rb'(?i)\r\n(?:content-length|transfer-encoding)'
                        rb'(?:[^:\r\n]*[ \t]:|:[^\r\n]*\r\n[ \t])')
#: macOS's own bundle, for Pythons that were installed without one.
SYSTEM_CA_FILE = '/etc/ssl/cert.pem'
OWN_RESPONSE_FIELDS = HOP_BY_HOP | {'content-length'}
#: Interim answers (100, 103) before the real one.
MAX_INTERIM = 20
#: As CONNECT_S, where the last connection was not made in time: a black hole mostly stays one.
CONNECT_AGAIN_S = 4
#: How long an address may be silent until the next is tried beside it (RFC 8305 section 5).
NEXT_ADDRESS_S = 0.25
#: Silence after which, and so often, TCP asks whether the other side is there; as the SDKs do.
TCP_ALIVE_S, TCP_ALIVE_PROBES = 60, 5
#: Idle connections that are kept to one server.
POOL_SIZE = 64
#: Bodies below this travel in one packet train with their head: one system call less.
JOIN_BYTES = 64 * 1024
#: Over TLS a larger body goes on in pieces of this size, with a look for an early answer between.
SEND_BYTES = 256 * 1024


def goes_to_client(name):
    """Neither fields of the connection, nor any that would let a web page read the answer."""
    return name not in OWN_RESPONSE_FIELDS and not name.startswith(('access-control-', 'x-proxy-'))


read_response_field = functools.lru_cache(maxsize=512)(
    functools.partial(read_field, goes_on=goes_to_client))


class UpstreamResponse:
    """An upstream's answer: `status`, `headers`, and the body by `read`."""

    def __init__(self, sock, exchange, idle_s: float = STREAM_IDLE_S):
        self._sock, self._exchange = sock, exchange
        self.idle_s = idle_s          # so long it may be silent within its body
        self._is_tls = hasattr(sock, 'pending')
        self._buffer = b''            # received, not yet used
        self._left = 0                # bytes to come of a body whose length is known
        self._take: Callable          # how the body is cut out of what is received
        self.ended = self.keep_alive = self.got_bytes = self._is_head_read = False
        self.when_closed: Callable    # takes the socket when it can be used again

    def read_head(self, method):
        """Reads up to the body, interim answers too, within the time that the exchange has.
        Raises UpstreamCut, ClientGone, UpstreamTimeout."""
        for _ in range(MAX_INTERIM + 1):
            while (end := self._buffer.find(b'\r\n\r\n')) < 0:
                if len(self._buffer) > MAX_HEAD_BYTES:
                    raise UpstreamCut('the head is too long')
                self._receive()
            data, self._buffer = self._buffer[:end], self._buffer[end + 4:]
            self._parse_head(data)
            if self.status >= 200 or self.status == 101:
                break                 # 100, 102 and 103 only announce the answer
        if self.status < 200:
            raise UpstreamCut('it switched protocols, or only announces an answer')
        #: The field lines that the client gets, as text.
        self.forwarded_head = forwarded_lines(self._fields, self.headers)
        self._choose_framing(method)
        self._is_head_read = True
        self._exchange.extend(self.idle_s)

    def limit_silence(self, seconds: float) -> None:
        """From here on it may be silent for so long."""
        self.idle_s = seconds
        self._exchange.extend(seconds)

    def _parse_head(self, data):
        # Malformed and folded lines are dropped, but not where they would give the length.
        first, self._fields, is_well_formed = split_head(data, read_response_field)
        if not is_well_formed and ODD_LENGTH.search(data):
            raise UpstreamCut('the length of its body is unclear')
        match = STATUS_LINE.fullmatch(first)
        if not match or len(self._fields) > MAX_FIELDS:
            raise UpstreamCut('it is no HTTP answer')
        self._is_old = match.group(1) == '0'
        self.status = int(match.group(2))
        self.headers = join_fields(self._fields)

    @property
    def fields(self) -> list[tuple[str, ...]]:
        """[(name, value), ...] of the lines that the client gets."""
        return [tuple(line.split(': ', 1)) for line in self.forwarded_head.split('\r\n')[:-1]]

    def _choose_framing(self, method):
        """RFC 9112 section 6.3."""
        options = name_list(self.headers.get('connection', ''))
        self.keep_alive = 'close' not in options and (not self._is_old or 'keep-alive' in options)
        length = self.headers.get('content-length')
        coding = self.headers.get('transfer-encoding')
        self.length = None            # of the body, where the head says it
        if method == 'HEAD' or self.status in (204, 304):
            if length and self.status != 204 and LENGTH.fullmatch(length):
                self.length = int(length)
            self.ended = True
        elif coding is not None:
            if name_list(coding) != {'chunked'}:      # said twice, it is still done once
                raise UpstreamCut('its transfer coding is unknown')
            self._take, self._chunks = self._take_chunks, ChunkReader()
        elif length is not None:
            if not LENGTH.fullmatch(length):
                raise UpstreamCut('its length is no number')
            self._take, self._left = self._take_counted, int(length)
            self.length, self.ended = self._left, not self._left
        else:
            self._take, self.keep_alive = self._take_rest, False

    def read(self) -> bytes:
        """The next piece of the body; b'' at its end.  Raises UpstreamCut when it ends too
        early, ClientGone, UpstreamTimeout."""
        while not self.ended:
            if self._buffer:
                piece = self._take()
                if piece or self.ended:
                    return piece
            try:
                self._receive()
            except UpstreamClosed:
                if self._take != self._take_rest:
                    raise
                self.ended = True
        return b''

    def read_all(self, limit: int) -> bytes:
        """The rest of the body, at most about `limit` bytes of it."""
        body = bytearray()
        while len(body) < limit and (piece := self.read()):
            body += piece
        return bytes(body)

    def _receive(self):
        try:
            data = self._sock.recv(RECEIVE_BYTES)
        except OSError as error:
            if isinstance(error, BlockingIOError) or type(error).__name__ == 'SSLWantReadError':
                raise NothingYet from error
            self._exchange.check()
            raise UpstreamCut(error_reason(error)) from error
        if not data:
            self._exchange.check()
            raise UpstreamClosed('it closed the connection')
        self.got_bytes = True
        if self._is_head_read:        # a head that comes byte by byte has no longer than others
            self._exchange.extend(self.idle_s)
        self._buffer = self._buffer + data if self._buffer else data

    def _take_rest(self):
        piece, self._buffer = self._buffer, b''
        return piece

    def _take_counted(self):
        piece, self._buffer = self._buffer[:self._left], self._buffer[self._left:]
        self._left -= len(piece)
        self.ended = not self._left
        return piece

    def _take_chunks(self):
        data, self._buffer = self._buffer, b''
        try:
            piece = self._chunks.feed(data)
        except BadChunks as error:
            raise UpstreamCut(str(error)) from error
        if self._chunks.ended:
            self.ended, self._buffer = True, self._chunks.rest
        return piece

    def wait(self, seconds: float) -> bool:
        """Waits for more of the answer; False when none came in that time."""
        deadline = time.monotonic() + seconds
        while not (self.ended or self._buffer):
            left = max(0, deadline - time.monotonic())
            if not self.has_received() and not readable([self._sock], left):
                return False
            if not self._is_tls:
                return True
            try:
                with self.not_waiting():
                    self._receive()
            except NothingYet:        # it held only a ticket, or half a record
                continue
            except UpstreamCut:       # the next read meets it too
                return True
        return True

    def has_received(self) -> bool:
        """Whether TLS holds bytes already: for these no socket becomes readable."""
        return self._is_tls and self._sock.pending() > 0

    @contextlib.contextmanager
    def not_waiting(self) -> Iterator[socket.socket]:
        """Within, a read that would have to wait raises NothingYet; gives the socket."""
        self._sock.settimeout(0)
        try:
            yield self._sock
        finally:
            self._sock.settimeout(None)

    def close(self) -> None:
        """Gives the connection back where nothing is left on it, and closes it otherwise."""
        self._exchange.detach()
        if self.ended and self.keep_alive and not self._buffer:
            self.when_closed(self._sock)
        else:
            self._sock.close()


class Upstream:
    """Sends requests over connections that are kept and reused."""

    def __init__(self, now=time.time):
        self._now = now               # wall clock: the monotonic one stops while a Mac sleeps
        self._lock = threading.Lock()
        self._idle = {}               # (scheme, host, port) -> [(socket, since), ...] newest last
        self._dialed = {}             # (host, port) -> its last Dialed, only ever replaced whole
        self._context = None
        self._context_lock = threading.Lock()

    def open(self, wanted: UpstreamRequest, exchange: Exchange, first_byte_s: float,
             wait: Callable | None = None) -> UpstreamResponse:
        """The UpstreamResponse to an UpstreamRequest, its head read; `close` ends it.
        `wait(response)`, when given, returns when something has come, and the body may be silent
        as long as its head.  A reused connection that dies before any byte of the answer is
        replaced silently.  Raises UpstreamUnreachable, UpstreamTimeout, ClientGone."""
        may_reuse = True
        while True:
            exchange.check()
            idle = self._take_idle(wanted.base) if may_reuse else None
            sock = idle or self._connect(wanted.base)
            response = UpstreamResponse(sock, exchange, first_byte_s if wait else STREAM_IDLE_S)
            try:
                exchange.attach(sock, first_byte_s)
                was_sent = send_request(sock, wanted, response)
                if wait:
                    wait(response)
                response.read_head(wanted.method)
                response.keep_alive = response.keep_alive and was_sent
                response.when_closed = functools.partial(self._put_back, wanted.base)
                return response
            except BaseException as error:
                exchange.detach()
                sock.close()
                if not isinstance(error, (UpstreamCut, OSError)):
                    raise
                exchange.check()
                if idle and not response.got_bytes:
                    may_reuse = False # it had been closed while it was idle: nothing was lost
                    continue
                reason = str(error) if isinstance(error, UpstreamCut) else error_reason(error)
                raise UpstreamUnreachable(f'{wanted.base.host}: {reason}', True) from error

    def _take_idle(self, base):
        """The newest idle connection that is still good, or None."""
        while True:
            with self._lock:
                idle = self._idle.get(base[:3])
                if not idle:
                    return None
                sock, since = idle.pop()
            # Bytes on an idle connection are its end, or an answer that nobody asked for.
            if 0 <= self._now() - since <= POOL_IDLE_S and not has_news(sock):
                return sock
            sock.close()

    def _put_back(self, base, sock):
        with self._lock:
            idle = self._idle.setdefault(base[:3], [])
            idle.append((sock, self._now()))
            surplus = idle.pop(0)[0] if len(idle) > POOL_SIZE else None
        if surplus:
            surplus.close()

    def close_idle(self, for_s: float = 0) -> None:
        """Closes connections that have been idle for some time, so that no request has to."""
        last = self._now() - for_s
        with self._lock:
            old = [sock for idle in self._idle.values() for sock, since in idle if since <= last]
            self._idle = {base: [entry for entry in idle if entry[1] > last]
                          for base, idle in self._idle.items()}
        for sock in old:
            sock.close()

    def _connect(self, base):
        proxy = outbound_proxy(base)
        server = proxy[:2] if proxy else (base.host, base.port)
        last = self._dialed.get(server, Dialed())
        deadline = time.monotonic() + (CONNECT_AGAIN_S if last.timeouts % 4 else CONNECT_S)
        sock = address = None
        try:
            sock, address = dial(in_turn(resolve(*server), last), deadline)
            sock = self._prepare(sock, base, proxy, deadline)
        except (OSError, UnicodeError) as error:
            if sock:
                sock.close()
            timeouts = last.timeouts + 1 if isinstance(error, socket.timeout) else 0
            self._dialed[server] = Dialed(address, False, timeouts)
            via = f' by way of the proxy {server[0]}:{server[1]}' if proxy else ''
            raise UpstreamUnreachable(f'{base.host}{via}: {error_reason(error)}', False) from error
        self._dialed[server] = Dialed(address, True)
        return sock

    def _prepare(self, sock, base, proxy, deadline):
        """The socket, or one around it, when requests can be sent on it."""
        sock.settimeout(seconds_until(deadline))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        keep_alive(sock)
        if proxy:
            proxy.open_tunnel(sock, proxy, base, deadline)
        if base.scheme == 'https':
            sock.settimeout(seconds_until(deadline))
            sock = self.tls_context().wrap_socket(sock, server_hostname=base.host)
        sock.settimeout(None)         # the watcher keeps the time
        return sock

    def tls_context(self):
        """One for all connections: making it takes 25 ms and more."""
        with self._context_lock:
            if self._context is None:
                import ssl
                context = ssl.create_default_context()
                paths = ssl.get_default_verify_paths()
                if not (paths.cafile or paths.capath) and os.path.exists(SYSTEM_CA_FILE):
                    context.load_verify_locations(SYSTEM_CA_FILE)
                self._context = context
            return self._context


def keep_alive(sock):
    """Has TCP ask a silent peer whether it is there: a NAT forgets a connection long before the
    system's two hours, and a model may think for minutes."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if os.name == 'nt':               # on, the milliseconds of silence before, and between
        sock.ioctl(socket.SIO_KEEPALIVE_VALS, (1, TCP_ALIVE_S * 1000, TCP_ALIVE_S * 1000))
        return
    mac_idle = 0x10 if sys.platform == 'darwin' else None     # not named before Python 3.10
    for option, value in ((getattr(socket, 'TCP_KEEPIDLE', mac_idle), TCP_ALIVE_S),
                          (getattr(socket, 'TCP_KEEPINTVL', None), TCP_ALIVE_S),
                          (getattr(socket, 'TCP_KEEPCNT', None), TCP_ALIVE_PROBES)):
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


class Dialed(NamedTuple):
    """What came of connecting to a server."""
    address: tuple | None = None      # the entry of getaddrinfo that connected
    worked: bool = False              # TLS, too, and the proxy
    timeouts: int = 0                 # in a row


def resolve(host, port):
    return dict.fromkeys(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))


def in_turn(addresses, last):
    """[address, ...]: families by turns (RFC 8305 section 4), so that a broken one costs little;
    the one that worked last first, the one that did not last."""
    families = {}
    for address in addresses:
        families.setdefault(address[0], []).append(address)
    turns = itertools.chain(*itertools.zip_longest(*families.values()))
    rank = {last.address: -1 if last.worked else 1}
    return sorted(filter(None, turns), key=lambda address: rank.get(address, 0))


def dial(addresses, deadline):
    """(socket, its address) of the first that connects.  The next is tried beside those that
    are silent for NEXT_ADDRESS_S, and at once when one fails.  Raises OSError."""
    waiting, errors = collections.deque(addresses), []
    with selectors.DefaultSelector() as selector:
        try:
            while waiting or selector.get_map():
                until = deadline
                if waiting:
                    if not begin_connection(selector, waiting.popleft(), errors):
                        continue
                    until = min(until, time.monotonic() + NEXT_ADDRESS_S) if waiting else until
                connected = await_connection(selector, until, errors)
                if connected:
                    return connected
                seconds_until(deadline)
        finally:
            for key in list(selector.get_map().values()):
                key.data[0].close()
    # A refusal says more than that there is no IPv6 here.
    raise next((error for error in errors if isinstance(error, ConnectionError)), errors[-1])


def begin_connection(selector, address, errors):
    """Adds a socket that connects; whether there is one."""
    family, kind, protocol, _, place = address
    sock = None
    try:
        sock = socket.socket(family, kind, protocol)      # of a family that this system may lack
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            sock.connect(place)
    except OSError as error:
        if sock:
            sock.close()
        errors.append(error)
        return False
    selector.register(sock, selectors.EVENT_WRITE, (sock, address))
    return True


def await_connection(selector, until, errors):
    """(socket, its address) of the first that connects; None when one failed or time is up."""
    for key, _ in selector.select(max(0, until - time.monotonic())):
        selector.unregister(key.fileobj)
        sock = key.data[0]
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not code:
            return key.data
        sock.close()
        words = getattr(socket, 'errorTab', {})   # Windows has its own
        errors.append(OSError(code, words.get(code) or os.strerror(code)))
    return None


def seconds_until(deadline):
    """What is left of a time; raises socket.timeout when nothing is."""
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise socket.timeout('timed out')
    return left_s


def send_request(sock, wanted, response):
    """One send for head and body where that saves a packet; whether all was sent: an upstream may
    answer a large body before it has read it (a 429, a 413)."""
    if len(wanted.body) <= JOIN_BYTES:
        sock.sendall(wanted.head + wanted.body)
        return True
    sock.sendall(wanted.head)
    # As much as the system takes at once; TLS cannot say how much that is: there in pieces.
    takes_some = hasattr(socket, 'MSG_DONTWAIT') and not hasattr(sock, 'pending')
    size, flags = (len(wanted.body), socket.MSG_DONTWAIT) if takes_some else (SEND_BYTES, 0)
    left = memoryview(wanted.body)
    while left:
        if not wait_to_send(sock):
            if response.wait(0):
                return False
            continue                  # no answer: TLS sends session tickets, say, by itself
        try:
            left = left[sock.send(left[:size], flags):]
        except BlockingIOError:       # it was ready, and is not any more
            continue
        except (BrokenPipeError, ConnectionResetError):
            if not has_news(sock):
                raise
            return False
    return True


def wait_to_send(sock):
    """Waits until a socket takes bytes; False when it has some itself, or its end."""
    if not hasattr(select, 'poll'):               # Windows
        return not select.select([sock], [sock], [])[0]
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN | select.POLLOUT)
    return all(not event & ~select.POLLOUT for _, event in poll.poll())


class Proxy(NamedTuple):
    """What HTTPS_PROXY or ALL_PROXY names."""
    host: str
    port: int
    user: str | None
    password: str
    open_tunnel: Callable     # (socket, Proxy, BaseUrl, deadline); raises OSError


def outbound_proxy(base):
    """The Proxy from the environment for an https upstream on another machine; None where there
    is none, or NO_PROXY names the upstream.  Raises UpstreamUnreachable."""
    names = ('https_proxy', 'HTTPS_PROXY', 'all_proxy', 'ALL_PROXY')
    if base.scheme != 'https' or not any(map(os.environ.get, names)) or is_loopback(base.host):
        return None
    from urllib.request import getproxies_environment, proxy_bypass
    urls = getproxies_environment()
    variable = 'HTTPS_PROXY' if urls.get('https') else 'ALL_PROXY'
    url = (urls.get('https') or urls.get('all') or '').strip()
    if not url or proxy_bypass(base.host) or proxy_bypass(f'{base.host}:{base.port}'):
        return None
    try:
        parts = urllib.parse.urlsplit(url if '://' in url else f'http://{url}')
        default_port, open_tunnel = PROXY_SCHEMES[parts.scheme]
        if not parts.hostname:
            raise ValueError('it names no host')
        port = parts.port or default_port
    except (ValueError, KeyError) as error:
        raise UpstreamUnreachable(
            f'{variable} must be a URL like http://host:port or socks5://host:port (SOCKS4 and a '
            'proxy behind TLS are not supported)', False) from error
    user = parts.username and urllib.parse.unquote(parts.username)
    password = urllib.parse.unquote(parts.password or '')
    return Proxy(parts.hostname, port, user, password, open_tunnel)


class ProxyFailed(OSError):
    """A proxy that does not connect us; `strerror` says why."""
    def __init__(self, reason):
        super().__init__(errno.ECONNREFUSED, reason)


def open_http_tunnel(sock, proxy, base, deadline):
    """By CONNECT (RFC 9110 section 9.3.6)."""
    place = f'[{base.host}]:{base.port}' if ':' in base.host else f'{base.host}:{base.port}'
    fields = [('Host', place)]
    if proxy.user is not None:
        login = base64.b64encode(f'{proxy.user}:{proxy.password}'.encode()).decode()
        fields.append(('Proxy-Authorization', f'Basic {login}'))
    sock.sendall(request_head(f'CONNECT {place} HTTP/1.1', fields))
    head = b''
    while not head.endswith(b'\r\n\r\n'):        # not a byte more: what follows is the upstream's
        if len(head) > MAX_LINE_BYTES:
            raise ProxyFailed('its answer is too long')
        head += receive_exactly(sock, 1, deadline)
    match = STATUS_LINE.fullmatch(head.partition(b'\r\n')[0].decode('latin-1'))
    if not match or match.group(2)[0] != '2':
        raise ProxyFailed(f'it answered {match.group(2)}' if match else 'it is no HTTP proxy')


SOCKS_NO_LOGIN, SOCKS_LOGIN = 0, 2
SOCKS_REFUSALS = {
    1: 'it failed', 2: 'its rules forbid it', 3: 'network unreachable', 4: 'host unreachable',
    5: 'connection refused', 6: 'timed out', 7: 'it does not connect', 8: 'no such addresses'}


def open_socks_tunnel(sock, proxy, base, deadline):
    """By SOCKS5 (RFC 1928).  The proxy looks the name up: ours may not know it."""
    methods = bytes((SOCKS_NO_LOGIN,) if proxy.user is None else (SOCKS_NO_LOGIN, SOCKS_LOGIN))
    sock.sendall(b'\x05' + with_length(methods))
    version, method = receive_exactly(sock, 2, deadline)
    if version != 5:
        raise ProxyFailed('it is no SOCKS5 proxy')
    if method == SOCKS_LOGIN and proxy.user is not None:      # RFC 1929
        sock.sendall(b'\x01' + with_length(proxy.user.encode())
                     + with_length(proxy.password.encode()))
        if receive_exactly(sock, 2, deadline)[1]:
            raise ProxyFailed('it does not accept this user name and password')
    elif method != SOCKS_NO_LOGIN:
        raise ProxyFailed('it asks for a user name and password, as in socks5://user:password@...')
    sock.sendall(b'\x05\x01\x00' + socks_address(base.host) + struct.pack('!H', base.port))
    version, code, _, kind = receive_exactly(sock, 4, deadline)
    if version != 5 or code:
        raise ProxyFailed(SOCKS_REFUSALS.get(code, 'it is no SOCKS5 proxy'))
    # What it is bound to, an IPv4 address, name or IPv6 address, and the port: nobody asked.
    size = {1: 4, 3: 1, 4: 16}.get(kind, 0)
    bound = receive_exactly(sock, size, deadline)
    receive_exactly(sock, (bound[0] if kind == 3 else 0) + 2, deadline)


def socks_address(host):
    for kind, family in ((b'\x01', socket.AF_INET), (b'\x04', socket.AF_INET6)):
        with contextlib.suppress(OSError):        # a name, or an address of the other kind
            return kind + socket.inet_pton(family, host)
    return b'\x03' + with_length(host.encode('idna'))


def with_length(data):
    if len(data) > 255:
        raise ProxyFailed('a name or password is longer than SOCKS5 allows')
    return bytes((len(data),)) + data


SOCKS = (1080, open_socks_tunnel)
PROXY_SCHEMES = {'http': (80, open_http_tunnel), 'socks5': SOCKS, 'socks5h': SOCKS}


def receive_exactly(sock, size, deadline):
    """So many bytes; raises OSError when they do not come in time."""
    data = b''
    while len(data) < size:
        sock.settimeout(seconds_until(deadline))
        if not (piece := sock.recv(size - len(data))):
            raise ProxyFailed('it closed the connection')
        data += piece
    return data


def is_loopback(host: str) -> bool:
    """Whether a host of a base URL is this machine, in any way of writing it."""
    if re.fullmatch(r'(?:.+\.)?localhost\.?|127(?:\.[0-9]+){1,3}', host):
        return True
    import ipaddress
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    address = getattr(address, 'ipv4_mapped', None) or address
    return address.is_loopback or address.is_unspecified


# ==============================================================================
# Compressed answers
# ==============================================================================
# Identity is asked for; what comes compressed all the same is undone as it is read.

#: Codings that need more than the standard library.  What else a field may say (identity, none,
#: utf-8) compresses nothing.
OPAQUE_CODINGS = ('br', 'zstd', 'compress', 'x-compress', 'dcb', 'dcz')
#: Codings of a body that lie in one another; more than one is odd already.
MAX_CODINGS = 4
#: What one read of a compressed body gives at the most: a megabyte of it may be a thousand.
DECODED_BYTES = 256 * 1024


def decoded(upstream: UpstreamResponse) -> UpstreamResponse | Uncoded | None:
    """The answer as it is read; None where its body cannot be decoded here."""
    field = upstream.headers.get('content-encoding')
    if field is None:                             # nearly always
        return upstream
    names = [name.strip().lower() for name in field.split(',')]
    codings = [name for name in names if name in ('gzip', 'x-gzip', 'deflate')]
    if len(codings) > MAX_CODINGS or any(name in OPAQUE_CODINGS for name in names):
        return None
    answer = Uncoded(upstream)
    for coding in reversed(codings):              # the last one was applied last
        answer = Inflated(answer, coding)
    return answer


class Uncoded:
    """An answer without its content-encoding field: what it names is undone, or was nothing."""
    length = None                 # of the body as it is read

    def __init__(self, upstream):
        self._upstream = upstream
        self.headers = {n: v for n, v in upstream.headers.items() if n != 'content-encoding'}
        self.fields = [(n, v) for n, v in upstream.fields if n.lower() != 'content-encoding']
        self.forwarded_head = ''.join(f'{name}: {value}\r\n' for name, value in self.fields)

    def __getattr__(self, name):
        return getattr(self._upstream, name)


class Inflated(Uncoded):
    """An answer whose body is inflated as it comes."""

    def __init__(self, upstream, coding):
        super().__init__(upstream)
        self._pieces = inflated(upstream.read, coding)
        self._piece = None            # that `wait` found; b'' where more has to be received

    read_all = UpstreamResponse.read_all

    def read(self):
        piece, self._piece = self._piece, None
        return piece or next(filter(None, self._pieces), b'')

    def wait(self, seconds):
        deadline = time.monotonic() + seconds
        while not self._piece:
            left_s = max(0, deadline - time.monotonic())
            if self._piece is not None and not self._upstream.wait(left_s):
                return False
            self._piece = next(self._pieces, None)
            if self._piece is None:
                break                 # it has ended
        return True


def inflated(read, coding):
    """Yields the body that `read` gives, inflated, in pieces; b'' each time before it reads.  Its
    own beginning says what it is: servers mistake gzip, zlib and raw deflate for one another, or
    name one and send none.  Raises UpstreamCut."""
    data = b''
    for member in itertools.count():              # gzip may have several
        while len(data) < 2:
            yield b''
            piece = read()
            if not piece and data and not member:
                raise UpstreamCut('its compressed body is not whole')
            if not piece:
                return
            data += piece
        is_gzip = data[:2] == b'\x1f\x8b'
        is_zlib = data[0] & 15 == 8 and int.from_bytes(data[:2], 'big') % 31 == 0
        if member and not is_gzip or not (is_gzip or is_zlib or coding == 'deflate'):
            while data:
                if not member:        # not compressed; else padding behind the last member
                    yield data
                yield b''
                data = read()
            return
        window = zlib.MAX_WBITS | 32 if is_gzip or is_zlib else -zlib.MAX_WBITS
        data = yield from inflated_member(zlib.decompressobj(window), data, read)


def inflated_member(inflater, data, read):
    """The same for what one inflater reads, whose first bytes came; returns those behind it."""
    while not inflater.eof:
        try:
            piece = inflater.decompress(data, DECODED_BYTES)
        except zlib.error as error:
            raise UpstreamCut('its compression is broken') from error
        data = inflater.unconsumed_tail
        if piece:
            yield piece
        elif not inflater.eof:
            yield b''
            if not (data := read()):
                raise UpstreamCut('its compressed body is not whole')
    return inflater.unused_data


# ==============================================================================
# Carrying streams
# ==============================================================================
# Nearly all that happens in a stream is an event that goes on as it came.  One thread does that
# for all streams, from whichever socket has one; what is more than that, a stream's own thread
# does, which waits meanwhile.  A stream is always with one of the two.

class Carried:
    """A stream that is being carried."""

    def __init__(self, upstream, events, response):
        self._upstream, self._events, self._response = upstream, events, response
        self.rest = b''               # what has come, and is not the client's yet: its failure
        self.error = None             # why it cannot be carried further, where that is one
        self.done = queue.SimpleQueue()       # gets one item then: a fifth of an Event's work

    def pass_on(self):
        """Passes on what has come; whether the stream is to be carried further."""
        try:
            while True:
                data = self._events.feed(self._upstream.read())
                if self._events.failure is not None:
                    self.rest = data
                    return False
                if not self._response.offer(data) or self._upstream.ended:
                    return False      # the client does not keep up, or nothing is left
                if not self._upstream.has_received():
                    return True
        except NothingYet:
            return True
        except Exception as error:    # of any kind: it is raised in the stream's own thread
            self.error = error
            return False


class StreamCarrier:
    """The thread that carries streams: one of its own for each took twice the processor time."""

    def __init__(self):
        self._selector = selectors.DefaultSelector()

    def start(self) -> None:
        threading.Thread(target=self._run, name='carrier', daemon=True).start()

    def carry(self, upstream: UpstreamResponse | Uncoded, events, response) -> bytes:
        """Passes on a stream until its own thread has to (at once where it must be decoded); the
        bytes of its failure, where that is why.  Raises what upstream.read and response do."""
        if not isinstance(upstream, UpstreamResponse):
            return b''
        carried = Carried(upstream, events, response)
        with upstream.not_waiting() as sock:
            if carried.pass_on():
                self._selector.register(sock, selectors.EVENT_READ, carried)
                carried.done.get()
        if carried.error:
            raise carried.error
        response.flush()
        return carried.rest

    def _run(self):
        while True:
            for key, _ in self._selector.select():
                if not key.data.pass_on():
                    self._selector.unregister(key.fileobj)
                    key.data.done.put(True)


# ==============================================================================
# Answers
# ==============================================================================
# One answer: read as far as it takes to know what it means, and relayed to the client.  Knows
# one attempt and no plan: what a refusal leads to is decided in Serving.

JSON_TYPE = ('content-type', 'application/json')
STREAM_FIELDS = [('content-type', 'text/event-stream; charset=utf-8'),
                 ('cache-control', 'no-cache')]


def new_request_id():
    return f'req_proxy_{random.getrandbits(96):024x}'


class Whole(NamedTuple):
    """What came of an attempt, read to its end; without `fields` there is nothing to relay."""
    outcome: Outcome
    fields: Sequence = ()     # ((name, value), ...) of the head that the client gets
    body: bytes = b''
    own_status: int = 0       # for the client, where it differs from the outcome's
    usage: dict = {}          # of a body that was translated

    @property
    def status(self):
        return self.own_status or self.outcome.status

    @property
    def headers(self):
        return {name.lower(): value for name, value in self.fields}


class Open(NamedTuple):
    """An answer that is still coming."""
    outcome: Outcome
    upstream: UpstreamResponse | Uncoded
    held: bytes               # what came of it so far, to be passed on first
    events: EventStream | None = None     # of a stream of /v1/messages
    own_fields: list | None = None    # of a head that is ours; None: the upstream's own goes on

    @property
    def headers(self):
        if self.own_fields is None:
            return self.upstream.headers
        return {name.lower(): value for name, value in self.own_fields}


class ClientSide:
    """The client's end of one request: its answer, what keeps it patient until that comes, and
    what is reported of it all, in header fields and to the journal."""

    def __init__(self, request, response, clock, now):
        self.request, self.response = request, response
        self.clock, self.now = clock, now
        self.started = clock()
        self.attempts = []            # [{'key': 'work', 'model': ..., 'status': 429, ...}, ...]
        self._has_failures = False    # among them
        self.queued_s = 0.0
        self.secrets = {value.split(' ')[-1] for _, value in request.credentials}
        self.record = {'outcome': 'failed'}   # what the log line says beside the attempts
        self.sticky = ''              # of a known conversation: 'stay', 'wait' or 'move'
        self.moved_because = ''
        self.request_id = new_request_id()    # or the upstream's once its answer is relayed
        self._next_ping = self.started + PING_S

    @property
    def was_queued(self):
        return self.queued_s >= 0.01          # not for having asked how long it would be

    @property
    def elapsed_ms(self):
        return round((self.clock() - self.started) * 1000)

    def without_secrets(self, text):
        """Text of an upstream, which may quote the credential that it was sent."""
        for secret in self.secrets:
            if len(secret) >= MIN_SECRET_CHARS and secret in text:
                text = text.replace(secret, mask_token(secret))
        return text

    def note_attempt(self, attempt, outcome, started):
        """Adds an attempt to the trail."""
        self.attempts.append({'key': attempt.key.id, 'provider': attempt.key.provider,
                              'model': attempt.model, 'status': outcome.status,
                              'result': outcome.rule.name,
                              'ms': round((self.clock() - started) * 1000)})
        if outcome.rule.step in (Step.NEXT_KEY, Step.STOP):
            self._has_failures = True

    def proxy_fields(self, attempt=None):
        """The x-proxy-* fields of an answer."""
        fields = []
        if attempt:
            fields = [('x-proxy-key', attempt.key.id), ('x-proxy-provider', attempt.key.provider)]
            if attempt.model:
                fields.append(('x-proxy-model', header_text(attempt.model)))
            asked = self.request.body.model
            if attempt.model and attempt.model != asked:
                fields.append(('x-proxy-fallback', header_text(f'{asked} -> {attempt.model}')))
            if self.sticky:
                fields.append(('x-proxy-sticky', self.sticky))
        if self.was_queued:
            fields.append(('x-proxy-queued', math.ceil(self.queued_s)))
        if self._has_failures or len(self.attempts) > 1:
            trail = ','.join(map(self._told_attempt, self.attempts[-MAX_TOLD_ATTEMPTS:]))
            fields.append(('x-proxy-attempts', trail))
        return fields

    def _told_attempt(self, attempt):
        """'work=429', or 'work/claude-sonnet-5-5=200' of another model than was asked for; what
        would end a model's name in this list is written as in a URL."""
        model = attempt['model']
        name = '' if model == self.request.body.model else f'/{(model or "")[:100]}'
        name = urllib.parse.quote(name, safe='/:@[]', errors='replace')
        return f'{attempt["key"]}{name}={attempt["status"] or attempt["result"]}'

    def finished_record(self):
        """What the journal is told at the end."""
        request = self.request
        record = {
            'id': self.request_id, 'profile': request.profile_name, 'method': request.method,
            'path': request.path[:300],
            'model': (request.body.model or '')[:300] or None if request.has_body else None,
            'status': self.response.status, **self.record, 'attempts': self.attempts,
            'duration_ms': self.elapsed_ms}
        further = {'queued_ms': self.was_queued and round(self.queued_s * 1000),
                   'conversation': (request.conversation_digest or '')[:8],
                   'sticky': self.sticky, 'moved_because': self.moved_because}
        return {**record, **{name: value for name, value in further.items() if value}}

    def keep_patient(self):
        """Sends a ping where one is due, to the client of a stream: it takes pings before the
        first event.  The seconds until the next."""
        left_s = self._next_ping - self.clock()
        if left_s > 0:
            return left_s
        self._next_ping = self.clock() + PING_S
        if self.request.body.is_streamed:
            if not self.response.started:
                self.response.start(200, [*STREAM_FIELDS, ('request-id', self.request_id),
                                          *self.proxy_fields()])
            self.response.write(PING_EVENT)
        return PING_S

    def await_upstream(self, upstream, until=math.inf):
        """Waits for an upstream to send something, the client patient meanwhile; False where
        nothing came until this time of the clock."""
        while True:
            left_s = until - self.clock()
            if left_s <= 0:
                return False
            if upstream.wait(min(left_s, self.keep_patient())):
                return True

    def hold_until(self):
        """When an opening that begins now has been held for long enough."""
        return self.clock() + PING_S if self.response.started else self._next_ping

    def read_piece(self, upstream, events):
        """The next piece of a stream.  Claude sends pings while it thinks; other servers do not,
        or send what the client does not get, so it gets ours until there is something to read."""
        if not (events.sends_pings and events.opened_by):
            self.await_upstream(upstream)
        return upstream.read()

    def write(self, data):
        """Passes on what came of a stream; a piece of nothing does not put off a ping."""
        if data:
            self.response.write(data)
            self._next_ping = self.clock() + PING_S

    def send_whole(self, status, fields, body):
        """An answer that is at hand; to a stream that was held open it is an `error` event."""
        if not self.response.started:
            return self.response.send(status, fields, body)
        error = read_error(body)
        self.response.write(error_event(error.type.split(' ')[0] or 'api_error', error.message))
        return self.response.finish()


# -- reading -------------------------------------------------------------------

def judge(client, attempt, status, headers, error):
    """The Outcome of an attempt that was answered so."""
    request = client.request
    answer = Answer(
        status, headers, error.type, error.message, upstream_now(headers, client.now()),
        request.path, attempt.model, attempt.model != request.body.model, error.details,
        bool(attempt.key.base_url))
    outcome = classify(answer, OPENAI_RULES if attempt.key.provider == OPENAI else RULES)
    # Only now: a credential may be a word that means something in the message.
    return outcome._replace(message=client.without_secrets(outcome.message),
                            limit_fields=rate_limit_fields(headers))


#: What a document begins with, and no line of an event stream.
DOCUMENT_STARTS = (b'{', b'[', b'<')
STREAM_START = re.compile(rb'(?:event|data|id|retry)?:')
CONTENT_START = re.compile(rb'"content"\s*:\s*\[')


def beginning(body):
    """The first bytes of a body that say something."""
    return bytes(body[:1024]).lstrip(b'\xef\xbb\xbf \t\r\n')


def tells_itself(begins):
    """Whether so many bytes of a body's beginning tell a document from a stream."""
    return begins[:1] in DOCUMENT_STARTS or len(begins) >= len(b'event:')


def seems_message(body):
    """Whether an object is a message without a doubt: to parse it costs more."""
    return (b'"error"' not in body and body.rstrip().endswith(b'}')
            and CONTENT_START.search(body) is not None)


class AnswerReader:
    """Reads the answer to one attempt: what it means is known by its status and the first piece
    of its body, of a stream by its first event with content."""

    def __init__(self, client, attempt, upstream, metrics):
        self._client, self._attempt, self._upstream = client, attempt, upstream
        self._metrics = metrics
        self._is_openai = attempt.key.provider == OPENAI
        self._is_readable = True      # not compressed by what only the client can undo
        if client.request.is_message or upstream.status >= 400:
            self._upstream = decoded(upstream) or upstream
            self._is_readable = 'content-encoding' not in self._upstream.headers

    def read(self, translated=None):
        """The Whole or Open answer; `translated` is the TranslatedStream of an OpenAI answer."""
        reply = None
        try:
            if self._upstream.status >= 300:
                reply = self._read_refusal()
            elif self._client.request.is_message and (self._is_readable or translated):
                reply = self._read_message(translated)
            else:
                reply = self._read_beginning()
            return reply
        except UpstreamCut as error:
            return Whole(Outcome(RESET, 0, f'the answer broke off: {error}', None))
        finally:
            if not isinstance(reply, Open):
                self._upstream.close()

    def _classify(self, status=None, error=NO_ERROR):
        attempt, upstream = self._attempt, self._upstream
        if attempt.key.id != CLIENT_REF:
            self._metrics.note_limits(attempt.key.ref, upstream.headers, upstream.status >= 400)
        if status is None and 200 <= upstream.status < 300:       # nearly always
            return Outcome(ANSWERED, upstream.status, '', None)
        return judge(self._client, attempt, status or upstream.status, upstream.headers, error)

    def _read_refusal(self):
        try:
            body = self._upstream.read_all(MAX_ERROR_BODY_BYTES)
        except UpstreamCut:
            outcome = self._classify()
            if outcome.rule.step is Step.NEXT_KEY:
                return Whole(outcome)     # status and fields are often clear enough
            raise                         # what would be relayed is not there
        outcome = self._classify(error=read_error(body) if self._is_readable else NO_ERROR)
        if self._is_openai:
            return self._in_anthropics_words(outcome)
        return Whole(outcome, self._upstream.fields, body)

    def _in_anthropics_words(self, outcome):
        """An OpenAI error in Anthropic's shape, in words by which a client knows what to do."""
        status, message = outcome.status, outcome.message
        is_clients = outcome.rule.step in (Step.RELAY, Step.REPAIR)
        if outcome.rule.name == 'context_too_long' or is_clients and re.search(
                TOO_LONG, message, re.IGNORECASE):
            status, message = 400, f'prompt is too long: {message}'
        elif is_clients:
            status = 400
        fields = [JSON_TYPE, ('request-id', self._client.request_id)]
        return Whole(outcome, fields, error_json(error_type(status), message), status)

    @property
    def _says_stream(self):
        return 'event-stream' in self._upstream.headers.get('content-type', '').lower()

    def _read_beginning(self):
        """Waits for the first piece of a body: until then another key may still answer."""
        may_make = self._client.request.may_make and not self._says_stream
        held = self._upstream.read_all(EDGE_BYTES) if may_make else self._upstream.read()
        return Open(self._classify(), self._upstream, held)

    def _read_message(self, translated):
        """The answer to a Messages request, which is what it begins with: no event can begin as
        a document does.  Only where it tells nothing does its content type count."""
        held, begins, piece = bytearray(), b'', True
        while piece and not tells_itself(begins) and len(held) < HELD_BYTES:
            piece = self._read_piece()
            held += piece
            begins = beginning(held)
        request = self._client.request.body
        is_stream = self._is_readable and begins[:1] not in DOCUMENT_STARTS and (
            bool(STREAM_START.match(begins)) or self._says_stream or request.wants_stream)
        if translated:
            return self._read_translated(translated, held, is_stream)
        if not is_stream:
            return self._read_document(held)
        if request.wants_stream or request.is_streamed:
            return self._read_opening(MessageStream(), held)
        return self._fold(held)

    def _read_piece(self):
        if self._client.request.body.wants_stream:    # a plain request just waits
            self._client.await_upstream(self._upstream)
        return self._upstream.read()

    def _read_opening(self, events, first, own_fields=None):
        """Holds a stream back until its first content: an error before that is no answer.  A
        message that has begun is not held for long: its model may think in silence."""
        held, until = bytearray(events.feed(bytes(first))), self._client.hold_until()
        while not events.opened_by and len(held) <= MAX_EVENT_BYTES:
            is_there = self._client.await_upstream(
                self._upstream, until if events.has_begun else math.inf)
            if not is_there:
                held += PING_EVENT
                break
            piece = self._upstream.read()
            held += events.feed(piece) if piece else events.last()
            if not piece and not events.opened_by:
                reason = 'the stream ended before its first content'
                rule = EMPTY_STREAM if events.can_be_asked_whole else NO_MESSAGE
                return Whole(Outcome(rule, 0, reason, None))
        if events.opened_by == 'error':
            return self._refused_in_stream(events)
        return Open(self._classify(), self._upstream, bytes(held), events, own_fields)

    def _refused_in_stream(self, events):
        """A 200 whose stream begins with an error is what that error says."""
        return self._refused(events.failure_status, describe_error(events.failure))

    def _refused(self, status, error):
        outcome = self._classify(status, error)
        if self._is_openai:
            return self._in_anthropics_words(outcome)
        type = error.type.split(' ')[0] or error_type(status)
        message = redact(self._client.without_secrets(error.message))
        return Whole(outcome, self._json_fields(), error_json(type, message))

    def _json_fields(self):
        """The upstream's fields, for a body that was made here."""
        fields = [(n, v) for n, v in self._upstream.fields if n.lower() != 'content-type']
        return [*fields, JSON_TYPE]

    def _no_message(self, body):
        told = read_error(body).message if body.strip() else 'nothing'
        told = redact(self._client.without_secrets(f'no message was sent, but {told}'))
        return Whole(Outcome(NO_MESSAGE, 0, told, None))

    def _read_document(self, held):
        """A plain answer, held until it is whole, or so long that it is no error."""
        response, body, is_whole = self._client.response, bytearray(held), False
        # What goes on in a stream of ours has to be whole: it becomes events.
        while not is_whole and len(body) < (MAX_BODY_BYTES if response.started else HELD_BYTES):
            piece = self._read_piece()
            body += piece
            is_whole = not piece
        is_object = beginning(body)[:1] == b'{'
        is_clear = is_object and (not is_whole or seems_message(body))
        if is_clear and not response.started:
            return Open(self._classify(), self._upstream, bytes(body))
        try:
            document = loads_object(body)
        except ValueError:
            return self._no_message(body)
        if document.get('type') == 'error' or (
                document.get('error') and not document.get('content')):
            error = read_error(body)
            return self._refused(status_of_error(error.details), error)
        if document.get('type') != 'message' and not isinstance(document.get('content'), list):
            return self._no_message(body)
        if not response.started:
            return Open(self._classify(), self._upstream, bytes(body))
        events = MessageStream()
        data = events.feed(b''.join(map(event_bytes, events_from_message(document))))
        return Open(self._classify(), self._upstream, data, events)

    def _fold(self, first):
        """One message of a stream that came to a plain request."""
        events, told, piece = MessageStream(), bytearray(), bytes(first)
        while True:
            told += events.feed(piece) if piece else events.last()
            if not piece or events.stopped or events.failure is not None:
                break
            if len(told) > MAX_BODY_BYTES:
                raise UpstreamCut('it is too long')
            piece = self._read_piece()
        if events.failure is not None:
            return self._refused_in_stream(events)
        if not events.opened_by:
            return self._no_message(told)
        if not (events.stopped or events.stop_reason):
            raise UpstreamCut('the stream ended before the message did')
        parser, read = SseParser(), []
        for data in parser.feed(bytes(told)) + parser.end():
            with contextlib.suppress(ValueError):     # no JSON: not of the message
                read.append(loads_object(data))
        body = dump_body(message_from_events(read))
        return Whole(self._classify(), self._json_fields(), body, usage=events.usage)

    def _read_translated(self, translated, held, is_stream):
        """An OpenAI answer: the opening of a stream, or all of it for who wants it whole."""
        request_id = ('request-id', self._client.request_id)
        stream_fields = [*STREAM_FIELDS, request_id]
        wants_stream = self._client.request.body.is_streamed
        if wants_stream and is_stream:
            return self._read_opening(translated, held, stream_fields)
        try:
            events = self._read_events(translated, bytes(held), is_stream)
        except ValueError:
            return Whole(self._classify(502, ErrorText('', 'its answer could not be read')))
        if translated.failure:
            return self._refused_in_stream(translated)
        if not translated.stopped:
            raise UpstreamCut('the stream ended before the message did')
        outcome = self._classify()
        if wants_stream:
            held = b''.join(map(event_bytes, events))
            return Open(outcome, self._upstream, held, translated, stream_fields)
        body = dump_body(message_from_events(events))
        return Whole(outcome, [JSON_TYPE, request_id], body, usage=translated.usage)

    def _read_events(self, translated, piece, is_stream):
        """[event, ...] of a whole answer.  Raises ValueError for one that cannot be read."""
        events, body, size = [], [], 0
        try:
            while piece:
                size += len(piece)
                if size > MAX_BODY_BYTES:
                    raise UpstreamCut('it is too long')
                if is_stream:
                    events += translated.read(piece)
                else:
                    body.append(piece)
                if translated.is_over:
                    break
                piece = self._read_piece()
        except UpstreamCut:
            events += translated.read_end(is_cut=True)
            if not translated.is_over:
                raise
            return events
        return events + (translated.read_end() if is_stream
                         else translated.read_whole(b''.join(body)))


# -- relaying ------------------------------------------------------------------

def relay(client, attempt, reply, carrier, cool):
    """Gives the client an upstream's answer: the commit.  What happens to it later, `cool` is
    given as an Outcome before the client hears of it, so that a retry meets another key."""
    asked = client.request.body.model
    client.record = {
        'outcome': 'answered' if reply.outcome.status < 400 else 'refused',
        'key': attempt.key.id, 'provider': attempt.key.provider,
        'upstream_model': attempt.model, 'ttfb_ms': client.elapsed_ms}
    if attempt.model != asked:
        client.record['fallback'] = f'{asked} -> {attempt.model}'
    headers = reply.headers
    client.request_id = headers.get('request-id') or client.request_id
    fields = client.proxy_fields(attempt)
    if 'date' not in headers:         # RFC 9110 section 6.6.1: who passes on adds what is missing
        fields.append(('date', http_date(int(client.now()))))
    if isinstance(reply, Whole):
        client.record.update(usage_fields(reply.usage))
        return client.send_whole(reply.status, [*reply.fields, *fields], reply.body)
    try:
        if reply.events:
            relay_stream(client, attempt, reply, fields, carrier, cool)
        else:
            relay_body(client, reply, fields, cool)
    finally:
        reply.upstream.close()


def relay_body(client, reply, fields, cool):
    """Any answer but a stream of messages, piece by piece as it comes."""
    response, upstream = client.response, reply.upstream
    if response.started:
        message = f'{PROGRAM}: a stream was asked for, and the upstream sent none.'
        client.record.update(outcome='failed', error=message)
        return client.send_whole(502, [], error_json('api_error', message))
    response.start(upstream.status, fields, upstream.length, upstream.forwarded_head)
    piece, tail = reply.held, b''
    try:
        while piece:
            response.write(piece)
            tail = (tail + piece)[-2048:] if len(piece) < 2048 else piece[-2048:]
            piece = upstream.read()
        response.finish()
    except (UpstreamCut, UpstreamTimeout) as error:
        if isinstance(error, UpstreamCut):
            cool(Outcome(BROKE_OFF, 0, str(error), None))
        response.abandon()
        client.record.update(outcome='failed', error=f'cut after the commit: {error}')
    client.record.update(read_usage(tail))


def relay_stream(client, attempt, reply, fields, carrier, cool):
    """Whole events as they arrive; an end that is none is told as an error."""
    response, upstream, events = client.response, reply.upstream, reply.events
    client.record['stream'] = True
    if not response.started and reply.own_fields is None:
        response.start(upstream.status, fields, forwarded=upstream.forwarded_head)
    elif not response.started:
        response.start(upstream.status, [*reply.own_fields, *fields])
    problem, is_cut = "the upstream's stream ended before the message did", True
    rest, is_open = reply.held, False     # what has come and not gone on
    try:
        while not events.is_over and events.failure is None:
            client.write(rest)
            rest = b''
            if events.opened_by and not is_open:
                is_open = True
                upstream.limit_silence(STREAM_IDLE_S)
            if carrier and events.can_be_carried and is_open:
                rest = carrier.carry(upstream, events, response)
            if events.failure is not None:
                break
            piece = client.read_piece(upstream, events)
            if not piece:
                break
            rest = events.feed(piece)
        rest += events.last()
    except UpstreamCut as error:
        problem = f"the upstream's stream broke off: {error}"
        rest = events.last(is_cut=True)       # it may lack nothing but its very end
    except UpstreamTimeout:
        problem = f'the upstream sent nothing for {format_duration(upstream.idle_s)}'
        is_cut = False
    client.record.update(usage_fields(events.usage))
    outcome = find_break(client, attempt, reply, problem if is_cut else None)
    if outcome:
        cool(outcome)
    response.write(rest)
    end_stream(client, events, problem)
    if events.is_over and events.stopped:
        with contextlib.suppress(UpstreamCut, UpstreamTimeout, ClientGone):
            if upstream.wait(LAST_CHUNK_S):
                upstream.read()       # the body's end: then the connection can be used again


def find_break(client, attempt, reply, problem):
    """The Outcome of a stream that did not end well after its commit, None where nothing cools:
    `problem` is a cut's, where there was one."""
    events = reply.events
    if events.failure is not None:
        status, error = events.failure_status, describe_error(events.failure)
        if status == 429:
            return judge(client, attempt, status, reply.upstream.headers, error)
        message = redact(client.without_secrets(error.message))
        return Outcome(BROKE_OFF, status, message, None) if status >= 500 else None
    is_whole = events.stopped or events.stop_reason
    return Outcome(BROKE_OFF, 0, problem, None) if problem and not is_whole else None


def end_stream(client, events, problem):
    """The end of a stream after its commit; `problem` is what it is when the message is not
    whole.  A second answer is never spliced in."""
    response = client.response
    if events.failure is not None:
        message = client.without_secrets(str(events.failure.get('message')))
        client.record.update(outcome='failed', error=redact(message[:300]))
    elif events.stop_reason and not events.stopped:
        response.write(event_bytes({'type': 'message_stop'}))
    elif not events.stopped:
        client.record.update(outcome='failed', error=problem)
        response.write(error_event('api_error', f'{PROGRAM}: {problem}.'))
    return response.finish()


USAGE_FIELDS = ('input_tokens', 'output_tokens', 'cache_read_input_tokens',
                'cache_creation_input_tokens')
USAGE_COUNT = re.compile(rb'"(%b)"\s*:\s*(\d{1,12})' % '|'.join(USAGE_FIELDS).encode())


def usage_fields(usage):
    return {name: usage[name] for name in USAGE_FIELDS if name in usage}


def read_usage(tail):
    """{'input_tokens': 10, ...} from the end of a plain answer's bytes, as far as it is there."""
    start = tail.rfind(b'"usage"')
    if start < 0:
        return {}
    return {name.decode(): int(count) for name, count in USAGE_COUNT.findall(tail, start)}


# -- what is answered here -----------------------------------------------------

def answer_without_claude(request, config):
    """(status, body) for what only Anthropic has: an estimate for count_tokens, the mapping's
    names for /v1/models, and 404 for the rest."""
    if request.path == COUNT_TOKENS_PATH and request.method == 'POST':
        body = request.body.json
        if not as_list(body.get('messages')):
            return 400, error_json('invalid_request_error', 'messages: Field required')
        try:
            return 200, dump_body({'input_tokens': estimate_tokens(body)})
        except RecursionError:
            return 400, error_json('invalid_request_error', 'The request is nested too deeply.')
    mapping = config.openai_model_mapping
    if request.path == MODELS_PATH and request.is_read:
        models = [model_info(name) for name in mapping if not name.endswith('*')]
        ids = [model['id'] for model in models]
        return 200, dump_body({'data': models, 'has_more': False, 'first_id': (ids or [None])[0],
                               'last_id': (ids or [None])[-1]})
    name = urllib.parse.unquote(request.path[len(MODELS_PATH) + 1:])
    is_known = name in mapping or name.startswith('claude') and map_model(mapping, name)
    if request.path.startswith(MODELS_PATH + '/') and request.is_read and is_known:
        return 200, dump_body(model_info(name))
    message = (f'{PROGRAM}: {request.path} needs an Anthropic key, and only OpenAI keys are '
               f'there. See: {RUN} add-key')
    return 404, error_json('not_found_error', message)


# ==============================================================================
# Failures
# ==============================================================================
# The final one: what a client is told when nothing is left to try.

class Failure(NamedTuple):
    """An attempt that did not answer in this round: tried (`reply`), or skipped as it cools."""
    attempt: Attempt
    outcome: Outcome
    reply: Whole | None
    is_cooling: bool          # now
    asked_in_s: float | None = None   # until it may be tried again; None: nothing keeps it
    back_in_s: float | None = None    # until the limit itself ends


class FinalFailure(NamedTuple):
    status: int
    fields: list
    body: bytes
    message: str
    key: Key | None = None


def final_failure(failures, client, config):
    """The answer when nothing is left: Anthropic's shape, what was tried, when to come back."""
    if not failures:
        return no_plan_failure(client, config)
    failures = [failure for failure in failures if failure.outcome.rule is not UNFIT] or failures
    finals = {failure.outcome.rule.final for failure in failures}
    final = next(final for final in Final if final in finals)
    keys = {failure.attempt.key.ref: failure.attempt.key for failure in failures}
    tried = [failure for failure in failures if failure.reply and failure.reply.body]
    is_clients_own = all(key.id == CLIENT_REF for key in keys.values())
    if tried and (final is Final.VERBATIM or is_clients_own and final.is_hopeless):
        # That a key does not know a file tells nothing where another key was not heard.
        heard = [failure for failure in tried if failure.outcome.rule is not ELSEWHERE] or tried
        return verbatim_failure(heard[0], client, is_clients_own)
    status, type = final.status, final.type
    if final is Final.UNAUTHORIZED and len(keys) == 1:
        status, type = 401, 'authentication_error'
    elif final is Final.VERBATIM:     # all of them were skipped: say what they last said
        status = failures[0].outcome.status
        type = next((t for t, s in STATUS_OF_ERROR.items() if s == status), 'api_error')
    return own_failure(status, type, failures, client, final)


def no_plan_failure(client, config):
    if any(key.provider == ANTHROPIC for key in config.keys.values()):
        message = f'{PROGRAM}: the profile {client.request.profile_name} is gone.'
    else:
        message = (f'{PROGRAM}: no Anthropic key is configured and the request carries none. '
                   f'Add one: {RUN} add-key')
    fields = [JSON_TYPE, ('request-id', client.request_id), ('x-should-retry', 'false')]
    return FinalFailure(401, fields, error_json('authentication_error', message), message)


def verbatim_failure(failure, client, is_clients_own):
    """An upstream's own answer.  A client whose own login was refused mends it by itself."""
    fields = [*failure.reply.fields, *client.proxy_fields(failure.attempt)]
    has_advice = any(name.lower() == 'x-should-retry' for name, _ in fields)
    if not (is_clients_own or has_advice or failure.outcome.status == 429):
        fields.append(('x-should-retry', 'false'))
    return FinalFailure(failure.reply.status, fields, failure.reply.body,
                        failure.outcome.message, failure.attempt.key)


def earliest_return(failures):
    """(seconds, Failure) of the key whose limit ends first; (infinity, None): only a person can
    help.  A key that failed in passing and does not cool is back at once."""
    returns = [(failure.back_in_s or 0, failure) for failure in failures
               if failure.outcome.rule.waits
               and (failure.back_in_s is not None or not failure.outcome.rule.final.is_hopeless)]
    return min(returns, key=lambda pair: pair[0], default=(math.inf, None))


def own_failure(status, type, failures, client, final):
    earliest_s, earliest = earliest_return(failures)
    message = failure_message(failures, final)
    fields = [JSON_TYPE, ('request-id', client.request_id), *client.proxy_fields()]
    is_soon = earliest_s <= CLIENT_PATIENCE_S
    if earliest and not final.is_hopeless and (earliest_s or final is not Final.SERVER):
        back_at = time.strftime('%H:%M:%S', time.localtime(client.now() + earliest_s))
        message += (f' Earliest back: {earliest.attempt.key.id} in {format_duration(earliest_s)}'
                    f' ({back_at}).')
        fields.append(('retry-after', max(1, math.ceil(earliest_s))))
    if final.is_hopeless or final is Final.LIMITED and not is_soon:
        fields.append(('x-should-retry', 'false'))
    limited = [failure for failure in (*failures, *([earliest] if earliest else ()))
               if failure.outcome.limit_fields]
    fields += limited[-1].outcome.limit_fields if limited else ()
    return FinalFailure(status, fields, error_json(type, message), message)


def failure_message(failures, final):
    """One sentence naming each key and model, and what it answered; equal answers together."""
    groups = {}       # what was said -> ['work with claude-opus-5-5 (back in 20 s)', ...]
    for failure in failures:
        outcome, attempt = failure.outcome, failure.attempt
        said = f'{outcome.status or ""} {outcome.rule.name}'.strip()
        if outcome.message:       # by that word Claude Code asks for its own login instead
            message = re.sub('x-api-key', 'API key', outcome.message[:200], flags=re.IGNORECASE)
            said += f', "{printable(message)}"'
        model = f' with {printable(attempt.model[:100])}' if attempt.model else ''
        groups.setdefault(said, []).append(f'{attempt.key.id}{model}{describe_return(failure)}')
    told = '; '.join(f'{", ".join(who)}: {said}' for said, who in groups.items())
    return f'{PROGRAM}: {final.lead}. {told}.'


def describe_return(failure):
    """' (back in 4 h, tried again in 60 min)'; nothing of what is not over by itself."""
    if not (failure.back_in_s and failure.outcome.rule.waits) or failure.outcome.rule.strikes > 1:
        return ''
    back, asked = map(format_duration, (failure.back_in_s, failure.asked_in_s))
    return f' (back in {back})' if back == asked else f' (back in {back}, tried again in {asked})'


# ==============================================================================
# Serving
# ==============================================================================
# One request, from its plan to its answer.  Policy stands in RULES; here it is carried out.

#: An overloaded model is asked again after 0.5 s, then so often.
LONGEST_BACKOFF_S = 2
#: A key that writes a conversation's cache anew is taken to be busy for no longer.
MOST_BUSY_S = 30
#: Things made whose keys are remembered: of others every key is asked until one knows it.
MAX_MAKERS = 10_000
#: Limits a minute, which keys of one organization share.
SHARED_LIMITS = ('rate_limited', 'throttled')


def has_room(outcome):
    """Whether its own figures say that it is another limit: a workspace's, or a burst's."""
    limits = read_limits(dict(outcome.limit_fields), now=0)
    return bool(limits) and max(limit.used for limit in limits) < 0.5


class Failover:
    """What all requests share: the configuration in force, cooldowns, connections, the journal,
    and what earlier requests taught."""
    changes = 0               # of what was taught: Metrics counts the requests that bring them

    def __init__(self, store, cooldowns, upstream, journal, carrier=None, clock=time.monotonic,
                 now=time.time, wait=threading.Event.wait, jitter=random.uniform):
        self.store, self.cooldowns, self.upstream = store, cooldowns, upstream
        self.journal, self.carrier = journal, carrier
        self.conversations = Conversations(clock, now)
        self.clock, self.now, self.wait, self.jitter = clock, now, wait, jitter
        self.repairs = {}             # what answers -> (Needed, ...) of its 400s
        self.makers = {}              # id of a batch or file -> ref of the key that knows it
        self.stopping = False
        self._token_problems = {}     # key's ref -> the problem that the log was told of
        self._plans = None, {}        # a Config, {(profile's name, model): Plan}

    def report_state(self) -> dict:
        """What requests taught, as JSON values."""
        return {'repairs': list(self.repairs.items()), 'makers': list(self.makers.items())}

    def restore(self, saved: dict, keys: dict[str, Key]) -> None:
        """Takes back the repairs that this version knows, and what these keys made."""
        for answerer, needed in saved['repairs']:
            is_claude = isinstance(answerer, str)
            names = {repair.name for repair in (REPAIRS if is_claude else OPENAI_REPAIRS)}
            repairs = tuple(Needed(name, str(subject)) for name, subject in needed
                            if name in names and is_about_model(name, subject))
            if repairs:
                self.repairs[answerer if is_claude else tuple(answerer)] = repairs
        for id, ref in saved['makers']:
            if ref in keys:
                remember(self.makers, id, ref, MAX_MAKERS)

    def plan(self, request, config):
        """The Plan for a request; an empty one where its profile is gone."""
        profile = config.profiles.get(request.profile_name)
        if profile is None:
            return Plan([], [])
        model = request.body.model if request.has_body else None
        plan = self._message_plan if request.is_message else self._other_plan
        return plan(request, config, profile, model)

    def _other_plan(self, request, config, profile, model):
        """The Plan for a path that only Anthropic has."""
        client_key = request.client_key if uses_clients_own(config, profile) else None
        planned, _ = plan_attempts(config, profile, [model], client_key)
        attempts = [attempt for attempt in planned if attempt.key.provider == ANTHROPIC]
        # Their own limits are not those of messages: a cooling key is only second choice.
        made = made_id(request.path)
        maker = self.makers.get(made)
        attempts.sort(key=lambda a: (a.key.ref != maker,
                                     bool(self.cooldowns.blocking(Slot(a.key.ref)))))
        is_found = bool(attempts) and attempts[0].key.ref == maker
        if model is None and not request.is_read and (is_found or not made):
            del attempts[1:]          # what it makes belongs to one key's organization
        return Plan(attempts, [])

    def _message_plan(self, request, config, profile, model):
        """The Plan for a model; kept for a Config, but where a client's own key may be in it."""
        planned_for, plans = self._plans
        if planned_for is not config or len(plans) > MAX_PLANS:
            plans = {}
            self._plans = config, plans
        plan = plans.get((profile.name, model))
        if plan is None:
            may_be_own = uses_clients_own(config, profile)
            models = model_chain(config.model_fallback, model) if model else [model]
            plan = plan_attempts(config, profile, models,
                                 request.client_key if may_be_own else None)
            if not may_be_own:
                plans[profile.name, model] = plan
        return plan

    def rank(self, strategy):
        """The function by which keys of one kind are ordered for a new conversation: ref -> what
        sorts first.  A key that is nearly spent keeps what is left for its own conversations."""
        metrics, conversations = self.journal.metrics, self.conversations
        usual_limit = strategy == 'spread' and max(
            map(metrics.token_limit, self.store.current.keys), default=0) or 1

        def load(ref):            # a key that has not been asked yet is taken for one like others
            count, tokens = conversations.load(ref)
            return (count + 1) / (metrics.token_limit(ref) or usual_limit), tokens
        by_strategy = {'order': lambda ref: 0, 'spread': load, 'drain': metrics.window_end}
        return functools.lru_cache(maxsize=None)(
            lambda ref: (metrics.is_nearly_spent(ref), by_strategy[strategy](ref)))

    def siblings(self, config, key):
        """Other API keys of a key's organization: they share their limits a minute."""
        organization = self.journal.metrics.organization
        own = organization(key.ref) if key.provider == ANTHROPIC and not is_plan(key) else None
        return [other for other in config.keys.values()
                if own and other.ref != key.ref and other.provider == ANTHROPIC
                and not is_plan(other) and organization(other.ref) == own]

    def note_token_problem(self, key, problem):
        """Logs why a key cannot be used: once, not with each request."""
        lasting = re.sub(r'\d+', '', problem)     # "expired 5 min ago", then 6 min
        if self._token_problems.get(key.ref) != lasting:
            self._token_problems[key.ref] = lasting
            self.journal.log.error('token_unavailable', key=key.id, message=problem)


class Round:
    """One look at all keys: what of the plan was tried, and what that rules out.  A kind is what
    another key would not answer otherwise: (base URL, model)."""

    def __init__(self, plan):
        self.attempts, self.last_resort = plan
        self.failures = []            # [Failure, ...]
        self.counts = {}              # (kind, rule name) -> answers
        self.given_up = {}            # kind -> the Outcome for which it was, or None
        self.dead_ends = set()        # base URLs that another key would not reach either
        self.hopes = []               # [Attempt, ...] that are made though they cool
        self.is_stopped = False

    def take_last_resort(self):
        """[Attempt, ...] that are to be tried beside what was."""
        taken, self.last_resort = self.last_resort, []
        self.attempts = self.attempts + taken
        return taken

    def count(self, kind, outcome):
        """Counts an answer; whether it was one too many of its kind."""
        counted = kind, outcome.rule.name
        self.counts[counted] = self.counts.get(counted, 0) + 1
        if self.counts[counted] >= outcome.rule.tries:
            self.given_up[kind] = outcome
        return kind in self.given_up

    def note_unreached(self, rule, base_url):
        """Another key of an unreachable host would fail alike; a reset gets one more try."""
        reached = self.counts[base_url, rule.name] = self.counts.get((base_url, rule.name), 0) + 1
        if rule is UNREACHABLE or reached > 1:
            self.dead_ends.add(base_url)

    def note_failure(self, failure):
        """The last one of an attempt counts."""
        self.failures = [f for f in self.failures if f.attempt != failure.attempt] + [failure]


class Serving:
    """One request on its way."""

    def __init__(self, failover, request, response, exchange):
        self._failover, self._exchange = failover, exchange
        self._request, self._response = request, response
        self._client = ClientSide(request, response, failover.clock, failover.now)
        self._clock, self._cooldowns = failover.clock, failover.cooldowns
        self._log = failover.journal.log
        self._config = failover.store.current
        self._round = Round(Plan([], []))
        self._uses_last_resort = False
        self._warm: Warm | None = None        # where its conversation is
        self._stays_until = math.inf  # and how long it may wait for that key
        self._patient_until: float | None = None      # how long it waits for the asked model
        self._backoffs = 0            # pauses for an overloaded model so far
        self._is_plain = False        # without fast mode, which is limited apart
        self._ticket = None           # in the queue
        self._queue_deadline = math.inf
        self._repairs = {}            # what answers -> [Needed, ...]
        self._repaired = 0            # repairs that this request brought
        self._asks_whole = False      # OpenAI's streams were empty: a plain answer is wanted
        self._told_left_out = False   # what a translation leaves out is told once
        self._servers = {}            # key's ref -> base URL
        self._token = ''              # of the last attempt, and where that went
        self._target = Target(MESSAGES, '')
        self._sent_body = {}          # of the last translated attempt
        self._translated = None       # the TranslatedStream that reads its answer

    def serve(self):
        """Answers the request, whatever happens, and tells the journal."""
        client = self._client
        try:
            attempts = self._begin_round()
            while not self._try_all(attempts):
                attempts = self._next_attempts()
                if attempts is None:
                    if not self._answer_here():
                        self._send_failure()
                    break
        except ClientGone:
            self._response.abandon()
            client.record['outcome'] = 'client_gone'
        finally:
            self._leave_queue()
            if self._translated and self._translated.dropped_calls:
                self._log.warn('call_without_name', id=client.request_id)
            record = client.finished_record()
            if 'output_tokens' in record:
                self._failover.conversations.finished(
                    self._request.conversation_digest, self._request.body.model,
                    f'{record["provider"]}:{record["key"]}', record)
            self._failover.journal.finished(record)

    # -- rounds ----------------------------------------------------------------

    def _begin_round(self):
        """[Attempt, ...] to be tried, on the configuration that is in force now."""
        self._config = self._failover.store.current
        self._round = Round(self._failover.plan(self._request, self._config))
        if self._uses_last_resort:
            self._round.take_last_resort()
        return self._preferred(self._round.attempts)

    def _preferred(self, attempts):
        """The plan in the order that suits this conversation: where its cache is, if that key
        is of the kind whose turn it is; a new one by the profile's strategy.  A key whose answers
        are paid beside its plan comes after the others of its kind."""
        failover, config, paid = self._failover, self._config, self._cooldowns.paid()
        digest, asked = self._request.conversation_digest, self._request.body.model
        if len(attempts) < 2 or not (digest or paid):
            return attempts
        strategy = config.profiles[self._request.profile_name].strategy
        if not self._warm and config.sticky_ms != 0:
            self._warm = failover.conversations.find(digest, asked)
        warm = self._warm
        own = warm.ref if warm else None
        metrics, first = failover.journal.metrics, attempts[0].key.ref
        if strategy != 'order' or paid or own not in (None, first) or any(
                map(metrics.is_nearly_spent, config.keys)):
            rank_new = failover.rank(strategy)
            attempts = order_attempts(attempts, lambda attempt: (
                attempt.key.ref in paid, attempt.key.ref != own, rank_new(attempt.key.ref)))
        if warm and warm.model != asked and self._clock() - warm.since < FALLBACK_STAY_S and (
                not failover.conversations.was_proved_since(asked, warm.since)):
            attempts = sorted(attempts, key=lambda attempt: attempt.model != warm.model)
        return attempts

    def _next_attempts(self):
        """What is tried after all of a round failed; None when that was all."""
        round = self._round
        if round.is_stopped:
            return None
        if self._goes_plain():
            return self._begin_round()
        slots = self._cooling_slots()
        if slots or not round.last_resort:
            hopes = self._last_hope()
            if hopes:
                return hopes
        if self._waits_out_overload():
            return self._preferred(round.attempts)
        if slots and (self._waits_for_home(slots) or self._wait_for(slots, self._queue_until())):
            return self._begin_round()
        failures = round.failures
        is_unknown = bool(failures) and not any(
            failure.outcome.rule.other_providers for failure in failures)
        if is_unknown and (self._request.body.model or '').startswith('claude'):
            return None               # no Claude of that name: the client should hear of it
        attempts = round.take_last_resort()
        self._uses_last_resort = self._uses_last_resort or bool(attempts)
        return attempts or None

    def _last_hope(self):
        """[Attempt] that is made though it cools, for a person may have mended what bars it: one
        of those that were only skipped."""
        round = self._round
        refused = {f.attempt.key.ref for f in round.failures
                   if f.reply is not None and f.outcome.rule.scope is Scope.KEY}
        skipped = {self._slot(f.attempt): f.attempt for f in round.failures
                   if f.reply is None and f.attempt not in round.hopes
                   and f.attempt.key.ref not in refused and not self._is_ruled_out(f.attempt)}
        slot = self._cooldowns.last_hope(list(skipped), in_line=self._config.queue_wait_ms > 0)
        hopes = [skipped[slot]] if slot else []
        round.hopes += hopes
        return hopes

    def _try_all(self, attempts):
        """Tries these in their order; whether the client was answered."""
        index, asked = 0, self._request.body.model
        while index < len(attempts) and not self._round.is_stopped:
            attempt, later = attempts[index], attempts[index + 1:]
            is_first_lower = index and attempts[index - 1].model == asked != attempt.model and (
                attempt.key.provider == ANTHROPIC)
            if is_first_lower and self._goes_plain():
                return self._try_all(self._begin_round())
            if is_first_lower and self._waits_for_model(attempts[:index]):
                index = 0
                continue
            if self._is_ruled_out(attempt):
                self._cool_unasked(attempt)
            elif self._try_in_turn(attempt, later):
                return True
            elif self._waits_to_stay(attempt):
                continue
            index += 1
        return False

    def _try_in_turn(self, attempt, later):
        """The attempt, unless it cools; whether the client was answered."""
        round = self._round
        if attempt in round.hopes:
            self._stop_waiting()
        cooling = None if attempt in round.hopes else self._admit(attempt)
        if cooling and (self._request.is_message or not cooling.outcome.rule.waits):
            round.note_failure(Failure(attempt, cooling.outcome, None, is_cooling=True))
            return False
        try:
            return self._try(attempt, later)
        finally:
            self._cooldowns.leave(self)

    def _waits_to_stay(self, attempt):
        """Waits for the key where the conversation's cache is, where that comes back so soon that
        to move would cost more; whether it is to be tried once more."""
        warm, most_s = self._warm, self._config.sticky_wait_ms / 1000
        if not warm or (warm.ref, warm.model) != (attempt.key.ref, attempt.model):
            return False
        cooling, now = self._blocking(attempt), self._clock()
        self._stays_until = min(self._stays_until, now + most_s)
        if cooling is None or not cooling.outcome.rule.waits or cooling.outcome.hint_s is None:
            return False
        left_s, _ = self._cooldowns.remaining_s(cooling)
        if not is_worth_waiting(left_s, warm.tokens, self._stays_until - now):
            return False
        self._warm = warm._replace(why='wait')
        return self._wait_for({self._slot(attempt)}, self._stays_until)

    def _waits_for_home(self, slots):
        """Where all keys cool: waits for the one where the conversation's cache is first, though
        another is back sooner, as long as that one would be busy with writing it anew."""
        warm, left_s = self._warm, self._seconds_left(slots)
        home = next((slot for slot in slots if warm and slot[:2] == (warm.ref, warm.model)), None)
        if warm is None or home is None or len(slots) == 1:
            return False
        later_s = left_s[home] - min(left_s.values())
        limit = self._failover.journal.metrics.token_limit(warm.ref)
        busy_s = min(60 * warm.tokens / limit, MOST_BUSY_S) if limit else 0
        most_s = max(self._config.sticky_wait_ms / 1000, busy_s)
        tokens = max(warm.tokens, TOKENS_PER_SECOND * busy_s)
        return is_worth_waiting(later_s, tokens, most_s) and self._wait_for(
            {home}, min(self._queue_until(), self._clock() + left_s[home] + PROBE_S))

    def _seconds_left(self, slots):
        """{slot: seconds until it may be tried again, as far as something keeps it}"""
        cooling = {slot: self._cooldowns.blocking(slot, self._ticket) for slot in slots}
        return {slot: self._cooldowns.remaining_s(c)[0] if c else 0.0
                for slot, c in cooling.items()}

    def _waits_for_model(self, attempts):
        """Pauses before a lower model is asked, where the asked one is only overloaded or limited
        for a moment; whether these attempts are to be made once more."""
        now = self._clock()
        if self._patient_until is None:
            troubled_s = self._failover.conversations.troubled_s(self._request.body.model)
            is_brief = troubled_s < FALLBACK_STAY_S       # else each turn would wait in vain
            patience_ms = self._config.fallback_patience_ms if is_brief else 0
            self._patient_until = now + patience_ms / 1000
        seconds = [self._seconds_to_ask(attempt) for attempt in attempts]
        pause_s = max(0.1, min(seconds))
        if now + pause_s > self._patient_until:
            return False
        overloaded = [a for a, s in zip(attempts, seconds) if s == pause_s == self._backoff_s]
        self._ask_overloaded(overloaded)
        self._pause(pause_s)
        return True

    def _goes_plain(self):
        """Whether fast mode is given up now: the same model without it comes before all else."""
        self._is_plain, was_plain = self._request.feature == 'fast', self._is_plain
        return self._is_plain and not was_plain

    def _ask_overloaded(self, attempts):
        """Has the next of some overloaded attempts made though it cools, and not in line: by
        asking nothing is taken from others."""
        if attempts:
            attempts = list(filter(self._is_at_home, attempts)) or attempts
            attempt = attempts[self._backoffs % len(attempts)]
            kind, round = (self._server(attempt.key), attempt.model), self._round
            round.hopes = [attempt]
            round.given_up.pop(kind, None)        # it is tried anew
            round.counts = {c: count for c, count in round.counts.items() if c[0] != kind}
            self._backoffs += 1

    @property
    def _backoff_s(self):
        return min(0.5 * 2 ** self._backoffs, LONGEST_BACKOFF_S)

    def _waits_out_overload(self):
        """Pauses where what failed is overloaded, within the time of the queue; whether all is to
        be tried once more."""
        overloaded = [failure.attempt for failure in self._round.failures
                      if failure.outcome.rule.final is Final.OVERLOADED]
        started, pause_s = self._clock(), self._backoff_s
        if not overloaded or started + pause_s > self._queue_until():
            return False
        self._ask_overloaded(overloaded)
        self._pause(pause_s)
        self._client.queued_s += self._clock() - started
        return True

    def _seconds_to_ask(self, attempt):
        """Until an attempt is worth another look; infinity where it is not."""
        failures = [f for f in self._round.failures if f.attempt == attempt]
        if failures and failures[0].outcome.rule.final is Final.OVERLOADED:
            return self._backoff_s
        cooling = self._blocking(attempt)
        if cooling is None or not cooling.outcome.rule.waits or cooling.place.server:
            return math.inf
        return self._cooldowns.remaining_s(cooling)[0]

    def _is_ruled_out(self, attempt):
        """Whether what others came to tells what this attempt would."""
        round = self._round
        if not (round.given_up or round.dead_ends):
            return False              # nearly always
        server = self._server(attempt.key)
        return (server, attempt.model) in round.given_up or server in round.dead_ends

    def _cool_unasked(self, attempt):
        """What cooled another key of its server cools this one too."""
        outcome = self._round.given_up.get((self._server(attempt.key), attempt.model))
        if outcome and outcome.rule.scope is Scope.PAIR and outcome.rule.strikes == 1:
            is_cooling = self._cool(attempt, outcome) > 0
            self._round.note_failure(Failure(attempt, outcome, None, is_cooling))

    def _server(self, key):
        """The base URL of a key, without its token being read each time."""
        if key.ref not in self._servers:
            self._servers[key.ref] = server_of(self._config, key)
        return self._servers[key.ref]

    def _slot(self, attempt):
        """What this attempt cools by: limits on models are those of /v1/messages alone."""
        key, request = attempt.key, self._request
        if not request.is_message:
            return Slot(key.ref, server=self._server(key))
        feature = None if self._drops_fast_mode(attempt) else request.feature
        return Slot(key.ref, attempt.model, feature if key.provider == ANTHROPIC else None,
                    self._server(key))

    def _drops_fast_mode(self, attempt):
        """Whether an attempt is made without the fast mode that was asked for."""
        return self._request.feature == 'fast' and (
            self._is_plain or attempt.model != self._request.body.model)

    def _admit(self, attempt):
        """What keeps an attempt from being made now, or None: then it is this request's turn."""
        return self._unless_renewed(attempt, functools.partial(self._cooldowns.admit, token=self))

    def _blocking(self, attempt):
        """The same for one that is only asked about."""
        return self._unless_renewed(attempt, self._cooldowns.blocking)

    def _unless_renewed(self, attempt, ask):
        """A refusal is of a secret: what the key's file or variable holds now was not refused."""
        if self._cooldowns.is_empty:
            self._stop_waiting()
            return None
        slot = self._slot(attempt)
        cooling = ask(slot, ticket=self._ticket)
        if cooling and has_new_secret(attempt.key, cooling.digest):
            self._cooldowns.clear(attempt.key.ref)
            cooling = ask(slot, ticket=self._ticket)
        return cooling

    def _stop_waiting(self):
        """It tries something now: its place in line is another's."""
        if self._ticket and self._ticket.slots:
            self._cooldowns.await_slots(self._ticket, ())

    # -- one attempt -----------------------------------------------------------

    def _try(self, attempt, later):
        """One attempt, with its repeats and repairs; whether the client was answered."""
        was_repeated = was_renewed = False
        while True:                   # but for MAX_REPAIRS each reason to go on counts once
            started = self._clock()
            reply = self._open(attempt)
            self._client.note_attempt(attempt, reply.outcome, started)
            needed = reply.outcome.repair
            if needed and self._learn_repair(attempt, needed):
                continue
            reply = self._unless_unfit(attempt, reply)
            rule = reply.outcome.rule
            if rule.step in (Step.RELAY, Step.REPAIR) and not self._may_be_elsewhere(rule, later):
                self._relay(attempt, reply, started)
                return True
            if rule.attention and not was_renewed and has_new_secret(
                    attempt.key, self._token and secret_digest(self._token)):
                was_renewed = True    # while the request was under way
                continue
            self._asks_whole = self._asks_whole or rule is EMPTY_STREAM
            if not self._tries_again(attempt, later, reply.outcome) or was_repeated:
                break
            was_repeated = True       # after a moment, so that many clients do not come at once
            self._pause(self._failover.jitter(0.5, 1.0))
        self._give_up(attempt, reply)
        return False

    def _unless_unfit(self, attempt, reply):
        """A refusal of the request itself counts where the client chose: of a fallback, or of a
        provider that only helps out, it says that this one cannot serve it."""
        outcome, request = reply.outcome, self._request
        is_refused = outcome.rule.step in (Step.RELAY, Step.REPAIR) and outcome.status >= 400
        if not (is_refused and request.is_message and self._is_stand_in(attempt)):
            return reply
        return Whole(outcome._replace(rule=UNFIT))

    def _may_be_elsewhere(self, rule, later):
        """Whether this key does not know a batch or a file, and another may: one that is tried
        next, or failed."""
        return rule is ELSEWHERE and (bool(later) or any(
            failure.outcome.rule is not ELSEWHERE for failure in self._round.failures))

    def _is_stand_in(self, attempt):
        """Whether an attempt is of a model or provider that was not asked for."""
        if attempt.key.provider == ANTHROPIC:
            return attempt.model != self._request.body.model
        return self._round.attempts[0].key.provider == ANTHROPIC

    def _open(self, attempt):
        """Sends one attempt; its Whole or Open answer."""
        failover, client, body = self._failover, self._client, self._request.body
        self._token, self._translated = '', None
        try:
            wanted = self._build(attempt)
            first_byte_s, wait = FIRST_BYTE_S, None
            if self._request.is_message and body.wants_stream:
                first_byte_s = stream_first_byte_s(self._config, self._target.base_url)
                wait = client.await_upstream
            upstream = failover.upstream.open(wanted, self._exchange, first_byte_s, wait)
            reader = AnswerReader(client, attempt, upstream, failover.journal.metrics)
            return reader.read(self._translated)
        except TokenUnavailable as error:
            failover.note_token_problem(attempt.key, str(error))
            return Whole(Outcome(NO_TOKEN, 0, str(error), None))
        except Untranslatable as error:
            return Whole(Outcome(UNTRANSLATABLE, error.status, str(error), None), [JSON_TYPE],
                         error_json(error.type, str(error)))
        except UpstreamUnreachable as error:
            rule = RESET if error.connected else UNREACHABLE
            return Whole(Outcome(rule, 0, error.reason, None))
        except UpstreamTimeout:
            return Whole(Outcome(TIMED_OUT, 0, 'no answer in time', None))

    def _build(self, attempt):
        """The UpstreamRequest.  Raises TokenUnavailable, Untranslatable."""
        request, betas, key = self._request, self._request.betas, attempt.key
        token = '' if key.id == CLIENT_REF else read_usable_token(key, self._failover.now())
        self._token = token
        self._client.secrets.add(token)
        self._target = target = find_target(self._config, key, token, attempt.model)
        if target.wire != MESSAGES:
            return self._translate(token)
        # Where there is one provider alone, a 400 would tell of thinking that was not signed.
        is_alone = request.is_message and not self._config.has_other_providers
        body = request.body if is_alone else request.claude_body
        data = body.data
        if request.is_message:
            data = body.for_model(attempt.model)
            if self._drops_fast_mode(attempt):
                data, betas = without_fast_mode(data, betas)
            repairs = self._repairs_for(attempt.model)
            if repairs:
                data, betas = apply_repairs(repairs, data, betas)
        return build_request(request, key, target.base_url, token, data, betas)

    def _translate(self, token):
        """The UpstreamRequest for an OpenAI target, and what reads its answer."""
        repairs = self._repairs_for(self._target.answerer)
        if any(needed.name == 'use_responses' for needed in repairs):
            self._target = self._target._replace(wire=RESPONSES)
        target = self._target
        try:
            conversation = self._request.conversation
            body = WIRES[target.wire].translate(conversation, target)
            body = edit_body(body, repairs, OPENAI_REPAIRS)
            if self._asks_whole and target.wire == CHAT_COMPLETIONS:
                body = without_path(without_path(body, ['stream']), ['stream_options'])
        except RecursionError as error:
            raise Untranslatable('The request is nested too deeply to be translated.') from error
        self._sent_body = body
        if conversation.notes.left_out and not self._told_left_out:
            self._told_left_out = True
            self._log.warn('left_out', id=self._client.request_id, model=target.model,
                           fields=list(conversation.notes.left_out))
        message_id = f'msg_{random.getrandbits(96):024x}'
        self._translated = answer_stream(
            conversation, target, message_id,
            lambda text: redact(self._client.without_secrets(text)))
        return build_openai_request(target, token, body, cache_key(conversation.body))

    def _relay(self, attempt, reply, sent_at):
        if 200 <= reply.outcome.status < 300:
            if not self._cooldowns.is_empty:
                self._cooldowns.succeeded(self._slot(attempt), sent_at)
            if attempt.key.provider == ANTHROPIC and self._request.is_message:
                self._cooldowns.note_paid(attempt.key.ref, extra_usage_ends_s(
                    reply.headers, self._failover.now()))
            if self._repaired:
                self._remember_repairs()
            if self._request.is_message:
                self._note_conversation(attempt)
            else:
                self._note_maker(attempt, reply)
        self._leave_queue()
        relay(self._client, attempt, reply, self._failover.carrier,
              functools.partial(self._cool, attempt))

    def _note_conversation(self, attempt):
        """Remembers where the conversation's cache is from now on."""
        request, warm, client = self._request, self._warm, self._client
        lifetime_s = cache_lifetime_s(request.body.data)
        if self._config.sticky_ms is not None:
            lifetime_s = self._config.sticky_ms / 1000
        why = next((f.outcome.rule.name for f in self._round.failures if warm and (
            f.attempt.key.ref == warm.ref or f.attempt.model == request.body.model)), 'order')
        if warm and (warm.ref, warm.model) == (attempt.key.ref, attempt.model):
            client.sticky = 'wait' if warm.why == 'wait' else 'stay'
        elif warm:
            client.sticky, client.moved_because = 'move', why
        self._failover.conversations.committed(request.conversation_digest, request.body.model,
                                               attempt, why, lifetime_s, request.client)

    def _note_maker(self, attempt, reply):
        """Remembers which key made, or knows, what this answer is about."""
        told = self._request.may_make and MADE_ID.search(reply.held[:EDGE_BYTES])
        for id in (told and told.group(1).decode(), made_id(self._request.path)):
            if id:
                remember(self._failover.makers, id, attempt.key.ref, MAX_MAKERS)

    def _tries_again(self, attempt, later, outcome):
        """Counts this answer, and says whether the same key is tried once more."""
        rule = outcome.rule
        if self._round.count((self._server(attempt.key), attempt.model), outcome):
            return False
        return rule.again is Again.FIRST or rule.again is Again.ALONE and (
            self._is_at_home(attempt) or not any(
                other.model == attempt.model and not self._blocking(other) for other in later))

    def _is_at_home(self, attempt):
        """Whether the conversation's cache is there: another key would write it anew."""
        return bool(self._warm) and attempt.key.ref == self._warm.ref

    def _pause(self, seconds):
        exchange, end = self._exchange, self._clock() + seconds
        while self._clock() < end:    # the queue's news wake it too
            exchange.wake.clear()
            exchange.check()
            left_s = min(end - self._clock(), self._client.keep_patient())
            self._failover.wait(exchange.wake, left_s)
        exchange.check()

    def _give_up(self, attempt, reply):
        round, outcome, rule = self._round, reply.outcome, reply.outcome.rule
        round.is_stopped = round.is_stopped or rule.step is Step.STOP
        if not rule.other_models:     # it is about the request, and not about the model
            others = [other for other in round.attempts if other.model != attempt.model
                      and other.key.provider == attempt.key.provider]
            round.given_up.update({(self._server(other.key), other.model): None
                                   for other in others})
        if rule.final is Final.OVERLOADED:
            self._failover.conversations.note_trouble(attempt.model)
        if rule in (RESET, UNREACHABLE):
            round.note_unreached(rule, self._target.base_url)
        is_cooling = self._cool(attempt, outcome) > 0
        round.note_failure(Failure(attempt, outcome, reply, is_cooling))

    def _cool(self, attempt, outcome):
        """Cools what the outcome says; the seconds, 0 for nothing."""
        rule, key = outcome.rule, attempt.key
        if rule.scope is None or rule.attention and not self._request.path.startswith(
                (MESSAGES_PATH, MODELS_PATH)):
            return 0          # what a key may not do elsewhere says nothing about messages
        slot, in_force = self._slot(attempt), self._failover.store.current.keys.get(key.ref)
        if rule.scope is Scope.PAIR and slot.model is None or (
                in_force and in_force.token != key.token):
            return 0          # not about messages; or of a token that was replaced meanwhile
        is_named = is_reference(key.token) and self._token and rule.scope is not Scope.SERVER
        digest = secret_digest(self._token) if is_named else None
        limit_s = self._config.cooldown_ms / 1000
        seconds = self._cooldowns.cool(key, slot, outcome, limit_s, digest)
        if rule.name in SHARED_LIMITS and not has_room(outcome):
            for other in self._failover.siblings(self._config, key):
                self._cooldowns.cool(other, slot._replace(ref=other.ref), outcome, limit_s)
        if seconds:
            self._log.write(
                'error' if rule.attention else 'warn', 'cooldown', key=key.id,
                model=slot.place(rule.scope).model, reason=rule.name,
                status=outcome.status, message=outcome.message[:300],
                cooldown_ms=round(seconds * 1000))
        return seconds

    # -- repairs ---------------------------------------------------------------

    def _repairs_for(self, answerer):
        """What this request needs: what 400s said, now and, but for the model that a client
        asked for, earlier.  `answerer` is a Claude model, or a Target's."""
        if answerer not in self._repairs:
            is_asked = answerer == self._request.body.model
            learnt = () if is_asked else self._failover.repairs.get(answerer, ())
            self._repairs[answerer] = list(learnt)
        return self._repairs[answerer]

    def _learn_repair(self, attempt, needed):
        """Notes what a 400 complains of; False when that was left out already."""
        if not self._request.is_message:
            return False
        answerer = attempt.model
        if self._target.wire != MESSAGES:
            answerer = self._target.answerer
            if not changes_request(needed, self._target, self._sent_body):
                return False
        repairs = self._repairs_for(answerer)
        if needed in repairs or self._repaired >= MAX_REPAIRS:
            return False
        repairs.append(needed)
        self._repaired += 1
        self._log.info('repair', model=attempt.model, repair=needed.name,
                       subject=self._client.without_secrets(needed.subject))
        return True

    def _remember_repairs(self):
        """What helped is done at once next time, unless it is about this conversation."""
        for answerer, repairs in self._repairs.items():
            lasting = tuple(needed for needed in repairs if is_about_model(*needed))
            if lasting and self._failover.repairs.get(answerer) != lasting:
                self._failover.repairs[answerer] = lasting

    # -- the queue -------------------------------------------------------------

    def _queue_until(self):
        """When this request has waited for long enough; at once where the queue is off."""
        wait_s = self._config.queue_wait_ms / 1000 if self._request.is_message else 0
        self._queue_deadline = min(self._queue_deadline, self._clock() + wait_s)
        return self._queue_deadline

    def _wait_for(self, slots, deadline):
        """Waits in the queue for one of these; False when none will come back in time."""
        entered = self._clock()
        if entered >= deadline:
            return False
        if self._ticket is None:
            self._ticket = self._cooldowns.join_queue(self._exchange.wake)
        self._cooldowns.await_slots(self._ticket, slots)
        try:
            return self._wait_in_queue(deadline)
        finally:
            self._client.queued_s += self._clock() - entered

    def _cooling_slots(self):
        """The slots to wait for: of every attempt that cools, or did when its turn came."""
        cooled = {self._slot(f.attempt) for f in self._round.failures if f.is_cooling}
        slots = {self._slot(attempt) for attempt in self._round.attempts}
        return {slot for slot in slots if slot in cooled
                or self._cooldowns.blocking(slot, self._ticket)}

    def _wait_in_queue(self, deadline):
        exchange = self._exchange
        while True:
            seconds, is_behind = self._cooldowns.seconds_to_turn(self._ticket)
            exchange.check()          # after the wake-up call was cleared, like what follows
            if self._failover.stopping:
                return False
            left = deadline - self._clock()
            if left <= 0 or seconds > left and not is_behind:
                return False
            if seconds == 0 or self._failover.store.current is not self._config:
                return True           # a changed configuration is worth another look
            until_ping = self._client.keep_patient()
            self._failover.wait(exchange.wake, min(left, until_ping, seconds))
            exchange.check()

    def _leave_queue(self):
        if self._ticket:
            self._cooldowns.leave_queue(self._ticket)
            self._ticket = None

    # -- the end ---------------------------------------------------------------

    def _send_failure(self):
        failures = list(map(self._with_return, self._round.failures))
        client, final = self._client, final_failure(failures, self._client, self._config)
        client.record.update(outcome='failed', error=final.message[:500])
        if final.key:
            client.record.update(key=final.key.id, provider=final.key.provider)
        client.send_whole(final.status, final.fields, final.body)

    def _with_return(self, failure):
        cooling = self._blocking(failure.attempt)
        if cooling is None:
            return failure
        asked_in_s, back_in_s = self._cooldowns.remaining_s(cooling)
        return failure._replace(asked_in_s=asked_in_s, back_in_s=back_in_s,
                                outcome=cooling.outcome)

    def _answer_here(self):
        """Answers what needs none, where no Claude key is left; whether it did."""
        request, config = self._request, self._config
        if request.is_message or request.profile_name not in config.profiles:
            return False
        if self._round.attempts and request.path != COUNT_TOKENS_PATH:
            return False
        if not any(key.provider == OPENAI and is_served(config, key)
                   for key in config.keys.values()):
            return False
        status, answer = answer_without_claude(request, config)
        fields = [JSON_TYPE, ('request-id', self._client.request_id), ('x-proxy-provider', OPENAI)]
        self._client.record['outcome'] = 'answered' if status < 400 else 'refused'
        self._response.send(status, fields, answer)
        return True


# ==============================================================================
# Autostart
# ==============================================================================
# How the system's own manager starts the proxy at login.  What its file holds is made from
# values; only the end of the section writes or runs anything.

LAUNCHD_LABEL, SYSTEMD_UNIT = 'com.github.claude-failover', f'{PROGRAM}.service'
#: What the proxy needs of the environment in which it was set up.
CARRIED_VARIABLES = ('HTTPS_PROXY', 'https_proxy', 'ALL_PROXY', 'all_proxy', 'NO_PROXY',
                     'no_proxy', 'SSL_CERT_FILE', 'SSL_CERT_DIR')
#: Control characters but the tab, and what is no UTF-8: a line end would begin a setting.
NOT_FOR_FILES = re.compile('[\0-\x08\n-\x1f\x7f\ud800-\udfff]')
RESTART_S = 10                # until the manager restarts a proxy that failed


class Autostart(NamedTuple):
    """One manager's way: a file, and the commands, (command, ...) each, that act on it."""
    manager: str              # 'launchd', 'systemd' or 'Windows'
    path: str
    content: bytes
    enable: tuple             # these two from the next login on: what runs goes on
    disable: tuple
    start: tuple
    stop: tuple
    restart: tuple
    hint: str = ''


def launchd_plist(command, environment, output):
    """The LaunchAgent's file (man launchd.plist); `command` is a list of arguments."""
    import plistlib
    return plistlib.dumps({
        'Label': LAUNCHD_LABEL, 'ProgramArguments': command, 'EnvironmentVariables': environment,
        'RunAtLoad': True, 'KeepAlive': {'SuccessfulExit': False}, 'ThrottleInterval': RESTART_S,
        'ProcessType': 'Interactive', 'WorkingDirectory': '/',
        'StandardOutPath': output, 'StandardErrorPath': output})


def systemd_unit(command, environment):
    """The user unit's file (man systemd.service).  It logs to the journal."""
    if re.search(r'["\'\\$]', command[0]):       # not in a program's name, but in an argument
        command = ['/usr/bin/env', *command]
    words = ' '.join(systemd_quoted(word, is_command=True) for word in command)
    variables = ''.join(f'Environment={systemd_quoted(f"{name}={value}")}\n'
                        for name, value in environment.items())
    return (f'[Unit]\nDescription={PROGRAM}: a local proxy for Claude Code\n\n'
            f'[Service]\nExecStart={words}\n{variables}Restart=on-failure\n'
            f'RestartSec={RESTART_S}\nTimeoutStopSec={DRAIN_S + 5}\nUMask=0077\n\n'
            f'[Install]\nWantedBy=default.target\n').encode()


def systemd_quoted(word, is_command=False):
    """A word in quotes for systemd: % begins a specifier, and $ in a command a variable."""
    word = word.replace('\\', '\\\\').replace('"', '\\"').replace('%', '%%')
    return '"' + (word.replace('$', '$$') if is_command else word) + '"'


def stable_interpreter(executable, which, exists=os.path.exists, realpath=os.path.realpath):
    """A path of this Python that outlives its next upgrade: not Homebrew's versioned folder."""
    real = realpath(executable)
    by_link = re.sub(r'/Cellar/([^/]+)/[^/]+/', r'/opt/\1/', executable)
    for path in (by_link, which('python3'), executable):
        if path and '/Cellar/' not in path and exists(path) and realpath(path) == real:
            return path
    return executable


#: Python keeps the syntax tree of the file it was given as long as it runs, 20 MB of this one,
#: but not that of a file that runpy runs.  -I: takes no module from the current folder.
BOOT = ('-I', '-c', 'import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name="__main__")')


def start_command(python: str, config_path: str) -> list:
    return [python, *BOOT, os.path.abspath(__file__), '--config', config_path, 'start']


def find_autostart(config_path: str, environ=os.environ, platform: str = sys.platform,
                   home: str | None = None) -> Autostart:
    """This system's Autostart for a configuration.  Raises FailoverError where there is none."""
    import shutil
    home = home or os.path.expanduser('~')
    python = stable_interpreter(getattr(sys, '_base_executable', None) or sys.executable,
                                shutil.which)
    command = start_command(python, config_path)
    environment = {name: environ[name] for name in CARRIED_VARIABLES if environ.get(name)}
    # Of a variable only the name is shown: a proxy's address may hold a password.
    for shown, word in (*zip(command, command), *environment.items()):
        if NOT_FOR_FILES.search(word):
            raise FailoverError(f'{printable(shown)!r} holds a line end or another character that '
                                'no file for starting at login can hold: use one without it.')
    if platform == 'darwin':
        return launchd_autostart(home, command, environment, output_path(config_path))
    if platform.startswith('linux'):
        return systemd_autostart(environ.get('XDG_CONFIG_HOME') or os.path.join(home, '.config'),
                                 command, environment)
    if platform == 'win32':
        return windows_autostart(home, command)
    raise FailoverError(f'Starting at login is not known for {platform}.')


def launchd_autostart(home, command, environment, output):
    path = os.path.join(home, 'Library', 'LaunchAgents', f'{LAUNCHD_LABEL}.plist')
    domain = f'gui/{os.getuid()}'
    service = f'{domain}/{LAUNCHD_LABEL}'
    return Autostart(
        'launchd', path, launchd_plist(command, {**environment, STARTED_BY: 'launchd'}, output),
        (('launchctl', 'print', domain),), (),    # it reads the folder at each login
        (('launchctl', 'bootstrap', domain, path),), (('launchctl', 'bootout', service),),
        (('launchctl', 'kickstart', '-k', service),))


def systemd_autostart(folder, command, environment):
    def to(verb):
        return (('systemctl', '--user', verb, SYSTEMD_UNIT),)
    return Autostart(
        'systemd', os.path.join(folder, 'systemd', 'user', SYSTEMD_UNIT),
        systemd_unit(command, {**environment, STARTED_BY: 'systemd'}),
        (('systemctl', '--user', 'daemon-reload'), *to('enable')),
        to('disable'), to('start'), to('stop'), to('restart'),
        'It starts when you log in; to have it run without that: loginctl enable-linger')


def windows_autostart(home, command):
    """A logon task that runs a one-line script; not yet tried on Windows."""
    import subprocess
    path = os.path.join(home, '.config', PROGRAM, 'autostart.cmd')
    run = (('schtasks', '/Run', '/TN', PROGRAM),)
    return Autostart(
        'Windows', path, f'@{subprocess.list2cmdline(command)}\r\n'.encode(),
        (('schtasks', '/Create', '/F', '/SC', 'ONLOGON', '/TN', PROGRAM, '/TR', path),),
        (('schtasks', '/Delete', '/F', '/TN', PROGRAM),), run, (), run)


def read_file(path: str) -> bytes | None:
    """A file's bytes; None where there is none."""
    try:
        with open(path, 'rb') as file:
            return file.read()
    except FileNotFoundError:
        return None


def start_at_login(autostart: Autostart) -> tuple[bool, str | None]:
    """From the next login on; (whether the manager's file changed, why its commands failed)."""
    has_changed = read_file(autostart.path) != autostart.content
    if has_changed:                   # in folders of the usual mode: the manager reads them
        os.makedirs(os.path.dirname(autostart.path), exist_ok=True)
        write_atomically(autostart.path, autostart.content)
    return has_changed, run_commands(autostart.enable)


def start_at_no_login(autostart: Autostart) -> bool:
    """Removes the manager's file; whether there was one."""
    run_commands(autostart.disable)   # while the manager still has the file
    was_there = os.path.exists(autostart.path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(autostart.path)
    return was_there


def start_commands(autostart: Autostart, content: bytes) -> list:
    """What a manager's file starts, in a form that can be compared."""
    if autostart.manager == 'launchd':
        import plistlib
        return plistlib.loads(content).get('ProgramArguments')
    return [line for line in content.splitlines() if line.startswith((b'ExecStart=', b'@'))]


def run_commands(commands: tuple) -> str | None:
    """Runs a manager's commands; why one failed, or None."""
    import subprocess
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f'{command[0]}: {error_reason(error)}'
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            return f'{command[0]}: {last[0] if last else f"exit status {done.returncode}"}'
    return None


# ==============================================================================
# Tool setup
# ==============================================================================
# How Claude Code and the shells come to use the proxy, and how that is undone.  All else in their
# files stays as it is; only the end of the section reads or writes anything.

BASE_URL_VARIABLE, TOKEN_VARIABLE = 'ANTHROPIC_BASE_URL', 'ANTHROPIC_AUTH_TOKEN'
#: With a token of any kind Claude Code starts without a login and without a question.
ANY_TOKEN = PROGRAM
BLOCK_START, BLOCK_END = f'# >>> {PROGRAM} >>>', f'# <<< {PROGRAM} <<<'
BLOCK = re.compile(f'^{BLOCK_START}.*?^{BLOCK_END}[^\n]*(?:\n|\\Z)', re.DOTALL | re.MULTILINE)
JSON_SPACE = ' \t\r\n'
#: What may stand around the object: the byte order mark that Claude Code accepts, and space.
SETTINGS_EDGE = '\ufeff' + JSON_SPACE
CURSOR_NOTE = 'Cursor cannot use a proxy on this machine: its servers make the calls.'


class ToolError(FailoverError):
    status, type = 409, 'invalid_request_error'


class Member(NamedTuple):
    name: str
    start: int                # of its name
    value_start: int
    end: int


def json_members(text, start):
    """[Member, ...] of the object whose brace is at `start` of a valid JSON text."""
    decode = json.JSONDecoder().raw_decode
    members, position = [], json_position(text, start + 1)
    while text[position] != '}':
        name, end = decode(text, position)
        value_start = json_position(text, text.index(':', end) + 1)
        _, end = decode(text, value_start)
        members.append(Member(name, position, value_start, end))
        position = json_position(text, end)
        position = json_position(text, position + (text[position] == ','))
    return members


def json_position(text, start):
    """Where the next token of a JSON text begins."""
    return next(i for i in range(start, len(text)) if text[i] not in JSON_SPACE)


def set_member(text, start, name, value):
    """The text in which the object at `start` has this member: in its old place, or last."""
    members = json_members(text, start)
    for member in reversed(members):              # of two with one name the last counts
        if member.name == name:
            return text[:member.value_start] + json.dumps(value) + text[member.end:]
    entry = f'{json.dumps(name)}: {json.dumps(value)}'
    if members:
        last = members[-1]
        begins_line = text[:last.start].rstrip(' \t').endswith('\n')
        gap = f',{newline_of(text)}{line_indent(text, last.start)}' if begins_line else ', '
        return text[:last.end] + gap + entry + text[last.end:]
    is_outermost = not text[:start].strip(SETTINGS_EDGE)
    if is_outermost or '\n' in text.strip():      # what stands in one line stays there
        newline, outer = newline_of(text), line_indent(text, start)
        entry = newline + (outer * 2 or '  ') + entry + newline + outer
    return text[:start + 1] + entry + text[text.index('}', start):]


def drop_member(text, start, name):
    """The text in which the object at `start` lacks this member."""
    members = json_members(text, start)
    index = [member.name for member in members].index(name)
    if index + 1 < len(members):
        return text[:members[index].start] + text[members[index + 1].start:]
    if index:
        return text[:members[index - 1].end] + text[members[index].end:]
    return text[:start + 1] + text[text.index('}', members[index].end):]


def newline_of(text):
    return '\r\n' if '\r\n' in text else '\n'


def line_indent(text, position):
    """The white space with which the line of a position begins."""
    line = text[text.rfind('\n', 0, position) + 1:]
    return line[:len(line) - len(line.lstrip(' \t'))]


# -- Claude Code's settings and the shells -------------------------------------

def read_settings(text):
    """The settings in a text.  Raises ToolError where Claude Code could not read them either."""
    try:
        return loads_object(text.lstrip('\ufeff')) if text.strip(SETTINGS_EDGE) else {}
    except ValueError as error:
        raise ToolError(f'is not valid JSON ({error}): correct it, and run setup again') from error


def settings_environment(text):
    """The `env` of settings.  Raises ToolError where it is no object."""
    env = read_settings(text).get('env', {})
    if not isinstance(env, dict):
        raise ToolError('has an "env" that is no object: correct it, and run setup again')
    return env


def settings_with(text, variables):
    """Settings whose `env` holds these variables; nothing else in the text changes."""
    settings_environment(text)
    text = text if text.strip(SETTINGS_EDGE) else '{}\n'
    for name, value in variables.items():
        if 'env' not in read_settings(text):
            text = set_member(text, text.index('{'), 'env', {})
        text = set_member(text, env_start(text), name, value)
    return text


def settings_without(text, ours, previous):
    """Settings in which each variable with a value of `ours` has its `previous` one, or none."""
    for name, value in settings_environment(text).items():
        if name in previous and value in ours:
            if previous[name] is not None:
                text = set_member(text, env_start(text), name, previous[name])
            else:
                text = drop_member(text, env_start(text), name)
                if not settings_environment(text):
                    text = drop_member(text, text.index('{'), 'env')
    return text


def env_start(text):
    members = json_members(text, text.index('{'))
    return [member.value_start for member in members if member.name == 'env'][-1]


def with_block(line_format, text, variables):
    """A shell's start-up file with setup's block: in its old place, or at the end."""
    newline = newline_of(text)
    lines = itertools.starmap(line_format.format, variables.items())
    block = newline.join([BLOCK_START, *lines, BLOCK_END]) + newline
    if BLOCK.search(text):
        return BLOCK.sub(lambda match: block, text, count=1)
    if text and not text.endswith('\n'):
        text += newline
    return text + block


def block_environment(text):
    block = BLOCK.search(text)
    return dict(re.findall(r"^[a-z -]+ (\w+)[ =]'(.*)'\r?$", block.group(), re.MULTILINE)
                if block else ())


# -- which tools there are -------------------------------------------------------

class UserTool(NamedTuple):
    id: str
    name: str
    place: Callable           # ToolSetup -> the file's path
    write: Callable           # (text, variables) -> text
    remove: Callable          # (text, ours, previous) -> text
    read: Callable            # text -> {variable: value, ...} that it sets
    when: str                 # when a change takes effect


def shell(name, place, line_format="export {}='{}'"):
    return UserTool(name, name, place, functools.partial(with_block, line_format),
                    lambda text, ours, previous: BLOCK.sub('', text), block_environment,
                    'in new terminals')


TOOLS = (
    UserTool('claude-code', 'Claude Code',
             lambda setup: os.path.join(setup.claude_folder, 'settings.json'),
             settings_with, settings_without, settings_environment, 'in new sessions'),
    shell('zsh', lambda setup: os.path.join(setup.environ.get('ZDOTDIR') or setup.home, '.zshrc')),
    # On a Mac every terminal is a login shell.
    shell('bash', lambda setup: os.path.join(
        setup.home, '.bash_profile' if setup.platform == 'darwin' else '.bashrc')),
    shell('fish', lambda setup: os.path.join(
        setup.environ.get('XDG_CONFIG_HOME') or os.path.join(setup.home, '.config'), 'fish',
        'config.fish'), "set -gx {} '{}'"),
)
TOOL_IDS = tuple(tool.id for tool in TOOLS)


class ToolState(NamedTuple):
    tool: UserTool
    path: str
    is_found: bool            # on this machine
    url: str | None           # where the tool sends its requests, as far as its file says
    problem: str | None       # why its file is left alone


class Change(NamedTuple):
    """What became of a tool's file, or would; a text is None where there is no file."""
    tool: UserTool
    path: str
    before: str | None
    after: str | None
    text: str                 # what to say of it, after the path

    @property
    def is_change(self):
        return self.before != self.after


class ToolSetup:
    """The tools of one user, and the record of what was changed in their files."""

    def __init__(self, config_path: str, home: str | None = None, environ=os.environ,
                 platform: str = sys.platform):
        self.home = home or os.path.expanduser('~')
        self.environ, self.platform = environ, platform
        self.claude_folder = environ.get('CLAUDE_CONFIG_DIR') or os.path.join(self.home, '.claude')
        self.record_path = os.path.join(os.path.dirname(config_path), 'setup.json')

    def states(self) -> list[ToolState]:
        return list(map(self.state, TOOLS))

    def state(self, tool):
        path, url, problem = tool.place(self), None, None
        try:
            url = tool.read(read_text(path) or '').get(BASE_URL_VARIABLE)
        except (OSError, ToolError) as error:
            problem = describe_tool_error(error)
        return ToolState(tool, path, self.is_found(tool), url, problem)

    def is_found(self, tool: UserTool) -> bool:
        if tool.id == 'claude-code':
            import shutil
            return os.path.isdir(self.claude_folder) or bool(shutil.which('claude'))
        is_login_shell = os.path.basename(self.environ.get('SHELL', '')) == tool.id
        return is_login_shell or os.path.lexists(tool.place(self))

    def has_cursor(self) -> bool:
        import shutil
        places = (os.path.join(self.home, '.cursor'), '/Applications/Cursor.app')
        return any(map(os.path.exists, places)) or bool(shutil.which('cursor'))

    def configure(self, tool: UserTool, url: str, access_token: str | None = None,
                  is_dry: bool = False) -> Change:
        """Has a tool use the proxy at `url`.  Raises ToolError."""
        path = tool.place(self)
        with self._records(tool, is_dry) as records:
            before = read_text(path)
            text, record = before or '', records.get(path)
            base = original_text(tool, text, record, {url})
            wanted = {BASE_URL_VARIABLE: url}
            if tool.id == 'claude-code' and (access_token or not self._has_login(base)):
                wanted[TOKEN_VARIABLE] = access_token or ANY_TOKEN
            after, old_mode = before, None
            if not wanted.items() <= tool.read(text).items():
                refuse_read_only(path)
                after = tool.write(base, wanted)
            if access_token and TOKEN_VARIABLE in wanted and before is not None and not is_dry:
                old_mode = make_private(path)
            if after != before and not is_dry:
                was_there = record['existed'] if record else before is not None
                records[path] = make_record(tool, base, after, was_there, wanted)
                self._save(records)   # first: undo can do with a record of what did not happen
                write_text(path, after)
        done = f'uses {url} already' if after == before else f'now uses {url} ({tool.when})'
        if old_mode:
            done += (f'; it holds the access token, so only you can read it now (others could: '
                     f'mode {old_mode:o})')
        return Change(tool, path, before, after, done)

    def _has_login(self, settings_text):
        settings = read_settings(settings_text)
        env = settings_environment(settings_text)
        names = ('ANTHROPIC_API_KEY', TOKEN_VARIABLE, 'CLAUDE_CODE_OAUTH_TOKEN')
        if (settings.get('apiKeyHelper') or any(env.get(n) or self.environ.get(n) for n in names)
                or os.path.exists(os.path.join(self.claude_folder, '.credentials.json'))):
            return True
        folder = self.environ.get('CLAUDE_CONFIG_DIR') or self.home
        try:                          # a Mac keeps the login itself in its keychain
            state = object_or_none(read_text(os.path.join(folder, '.claude.json')) or '') or {}
        except OSError:
            return False
        return bool(state.get('oauthAccount') or state.get('primaryApiKey'))

    def undo(self, tool: UserTool, ours: set, is_dry: bool = False) -> Change:
        """Restores a tool's file; one edited since loses values of `ours`.  Raises ToolError."""
        path, done = tool.place(self), 'has nothing to undo'
        with self._records(tool, is_dry) as records:
            before, record = read_text(path), records.pop(path, None)
            after = before
            if before is not None:
                after = original_text(tool, before, record, ours)
                is_empty = after.strip() in ('', '{}')
                after = None if is_empty and record and not record['existed'] else after
            if after != before:
                done = ('is removed: setup made it' if after is None else
                        'does not use the proxy now')
                refuse_read_only(path)
                if not is_dry:
                    write_text(path, after)
            if not is_dry:
                self._save(records)
        return Change(tool, path, before, after, done)

    @contextlib.contextmanager
    def _records(self, tool, is_dry):
        """{path: record, ...}, for one process at a time.  Raises ToolError with tool and path."""
        try:
            with contextlib.nullcontext() if is_dry else folder_locked(self.record_path):
                # Where it cannot be read, undo takes out what looks like ours.
                yield object_or_none(read_text(self.record_path) or '') or {}
        except (OSError, ToolError) as error:
            raise ToolError(f'{tool.name}: {tilde(tool.place(self))} '
                            f'{describe_tool_error(error)}.') from error

    def _save(self, records):
        if records:
            write_atomically(self.record_path, json.dumps(records, indent=2).encode() + b'\n')
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.record_path)


def make_record(tool, before, after, was_there, variables):
    """What undo needs: the edit as [position, text before, text after], the new text's hash."""
    start = len(os.path.commonprefix([before, after]))
    end = len(os.path.commonprefix([before[start:][::-1], after[start:][::-1]]))
    return {'tool': tool.id, 'existed': was_there, 'digest': text_digest(after),
            'edit': [start, before[start:len(before) - end], after[start:len(after) - end]],
            'values': list(variables.values()),
            'previous': {name: tool.read(before).get(name) for name in variables}}


def original_text(tool, text, record, ours):
    """A tool's text as it was before setup, from the record if it fits, else without `ours`."""
    if record and record['digest'] == text_digest(text):
        start, before, after = record['edit']
        return text[:start] + before + text[start + len(after):]
    previous = record['previous'] if record else {BASE_URL_VARIABLE: None, TOKEN_VARIABLE: None}
    return tool.remove(text, {*ours, ANY_TOKEN, *(record['values'] if record else ())}, previous)


def text_digest(text):
    return hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()


def read_text(path):
    """A file's text, each byte of it kept; None where there is none."""
    data = read_file(path)
    return None if data is None else data.decode('utf-8', 'surrogateescape')


def refuse_read_only(path):
    """Raises ToolError for a file that its owner, or what generates it, made read-only."""
    if os.path.exists(path) and not os.stat(path).st_mode & stat.S_IWUSR:
        raise ToolError('is read-only: make it writable, or change it where it is made')


def write_text(path, text):
    """Replaces a file, its mode and links kept; with None, removes it."""
    if text is None:
        os.unlink(path)
        return
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
    except FileNotFoundError:
        mode = 0o600
        os.makedirs(os.path.dirname(os.path.realpath(path)), exist_ok=True)
    write_atomically(path, text.encode('utf-8', 'surrogateescape'), mode)


def describe_tool_error(error):
    return str(error) if isinstance(error, ToolError) else f'cannot be used ({error.strerror})'


def own_values(config: Config | None, ports: dict) -> set:
    """What setup may have set variables to: our addresses (`ports`: the open ones), our token."""
    numbers = {*(p.port for p in (config.profiles.values() if config else ())), *ports.values()}
    own = {local_url(port) for port in numbers if port}
    return {*own, config.access_token} if config and config.access_token else own


# ==============================================================================
# API
# ==============================================================================
# What the dashboard and scripts ask for.  The Node program's addresses and names are kept, so
# that its scripts go on working.  No answer holds a token.

class Parts:
    """What the API and the HTTP server know of the program that the Service puts together."""
    store: ConfigStore
    log: JsonLog
    bus: EventBus
    metrics: Metrics
    cooldowns: Cooldowns
    watcher: Watcher
    upstream: Upstream
    failover: Failover
    login_codes: LoginCodes
    slots: threading.BoundedSemaphore     # of connections
    stopping: bool
    ports: Callable           # () -> {profile name: its open port}
    health: Callable          # () -> what /health reports
    update: Callable          # (edit) -> what the edit gave, saved and in force by then
    refuse_taken_port: Callable       # (port); raises BadRequest where another program has it


class Call(NamedTuple):
    app: Parts
    head: RequestHead
    body: bytes
    response: ClientResponse
    profile_name: str
    connection: ClientConnection

    @property
    def config(self) -> Config:
        return self.app.store.current

    def send_json(self, value, status=200, fields=()):
        data = json.dumps(value, indent=2).encode() + b'\n'
        self.response.send(status, [JSON_TYPE, *OWN_FIELDS, *fields], data)

    def send_done(self, event, answer=(), status=200, cookies=(), **logged):
        """Logs what the request has changed, and answers that it succeeded."""
        self.app.log.info(event, **logged)
        self.send_json({'success': True, **dict(answer)}, status, cookies)

    def raw_json(self):
        """The body as a JSON object; {} when it is empty.  Raises BadRequest."""
        try:
            return loads_object(self.body) if self.body else {}
        except ValueError as error:
            raise BadRequest(f'The body must be a JSON object: {error}.') from error

    def json(self, **checks):
        """{name: value} of the body without nulls.  Raises BadRequest for what `checks` refuse."""
        body = self.raw_json()
        for name, value in body.items():
            if name not in checks:
                raise BadRequest(f'There is no field {printable(name)[:60]!r} here; there are: '
                                 f'{", ".join(checks) or "none"}.', field=name)
            complaint = None if value is None else checks[name](value)
            if complaint:
                raise BadRequest(f'{name} {complaint}.', field=name)
        return {name: value for name, value in body.items() if value is not None}

    @property
    def query(self):
        """{name: its last value} of the target's query."""
        return dict(urllib.parse.parse_qsl(self.head.target.partition('?')[2]))


OWN_FIELDS = [('cache-control', 'no-store'), ('x-content-type-options', 'nosniff'),
              ('x-frame-options', 'DENY'), ('content-security-policy', "default-src 'none'")]
PLAIN_TEXT = ('content-type', 'text/plain; charset=utf-8')
TO_DASHBOARD = [('location', '/dashboard'), *OWN_FIELDS]
DASHBOARD_PATH = os.path.join(os.path.dirname(os.path.realpath(__file__)), 'dashboard.html')


def wanted_field(fields, name):
    if name not in fields:
        raise BadRequest(f'{name} is missing.', field=name)
    return fields[name]


def show_start_page(call: Call):
    if 'text/html' in call.head.headers.get('accept', ''):    # a person
        return call.response.send(303, TO_DASHBOARD)
    text = (f'{PROGRAM} {VERSION} is running, profile {call.profile_name}.\n'
            'Point ANTHROPIC_BASE_URL here; see /dashboard or /health for its state.\n')
    return call.response.send(200, [PLAIN_TEXT, *OWN_FIELDS], text.encode())


def show_dashboard(call: Call):
    """dashboard.html from beside this file, read anew each time."""
    code = call.query.get('code')
    if code is not None:
        is_known = call.app.login_codes.use(code)
        cookies = session_cookies(call.config.access_token) if is_known else []
        return call.response.send(303, TO_DASHBOARD + cookies)
    try:
        with open(DASHBOARD_PATH, 'rb') as file:
            page = file.read()
    except OSError:
        text = (f'The dashboard is a separate file: put dashboard.html beside this program, as\n'
                f'{DASHBOARD_PATH}\nWithout it, /health and `{RUN} status` show the same.\n')
        return call.response.send(404, [PLAIN_TEXT, *OWN_FIELDS], text.encode())
    fields = [('content-type', 'text/html; charset=utf-8'), ('referrer-policy', 'no-referrer'),
              ('content-security-policy', page_policy(page)), *OWN_FIELDS[:-1]]
    return call.response.send(200, fields, page)


def page_policy(page):
    """A content security policy that lets only this page's own scripts and styles run."""
    def sources(tag):
        parts = re.findall(rb'<%b>(.*?)</%b>' % (tag, tag), page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(part).digest()).decode() for part in parts)
        return ' '.join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    return (f"default-src 'none'; script-src {sources(b'script')}; style-src {sources(b'style')}; "
            "connect-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; "
            "form-action 'none'")


# -- the access token, for a browser -----------------------------------------------

LOGIN_CODE_S = 60


def session_value(access_token):
    """What a browser shows instead of the access token: a hash of it."""
    return hmac.new(access_token.encode(), b'dashboard', 'sha256').hexdigest()


def session_cookies(access_token):
    """The header field that lets a browser in, in a list; empty without an access token."""
    return [('set-cookie', f'{PROGRAM}={session_value(access_token)}; Path=/; HttpOnly; '
                           f'SameSite=Strict; Max-Age={30 * 86400}')] if access_token else []


def has_session(headers: dict, access_token: str) -> bool:
    wanted = session_value(access_token).encode()
    pairs = (pair.strip().partition('=') for pair in headers.get('cookie', '').split(';'))
    return any(name == PROGRAM and hmac.compare_digest(value.encode('latin-1'), wanted)
               for name, _, value in pairs)


class LoginCodes:
    """Codes by which a command lets a browser in, once: an address cannot keep a secret."""

    def __init__(self, clock=time.monotonic):
        self._clock = clock
        self._lock = threading.Lock()
        self._codes = {}              # code -> until when it may be used

    def make(self):
        code = os.urandom(16).hex()
        with self._lock:
            now = self._clock()
            self._codes = {c: until for c, until in self._codes.items() if until > now}
            self._codes[code] = now + LOGIN_CODE_S
        return code

    def use(self, code):
        """Whether a code is one of these and still good; from now on it is not."""
        with self._lock:
            return self._codes.pop(code, -math.inf) > self._clock()


def api_login(call: Call):
    access_token = call.config.access_token
    token = wanted_field(call.json(token=check_text), 'token')
    if access_token and not is_same_secret(token, access_token):
        raise BadRequest('This is not the access token.', 401, 'authentication_error',
                         field='token')
    call.send_json({'success': True}, fields=session_cookies(access_token))


# -- what there is to see ------------------------------------------------------------

NODE_METRICS = {'total': 'requests', 'success': 'answered', 'failures': 'failed',
                'retries': 'rotations', 'modelFallbacks': 'fallbacks', 'byKey': 'by_key'}


def api_status(call: Call):
    status = full_status(call)
    metrics = status['metrics']
    metrics.update({name: metrics[ours] for name, ours in NODE_METRICS.items()})
    call.send_json({**status, 'uptime': status['uptime_s']})


def full_status(call: Call):
    conversations = conversation_views(call)
    return {**call.app.health(), 'profile': call.profile_name,
            'history': call.app.metrics.history(), 'conversation_count': len(conversations),
            'conversations': conversations[:SHOWN_CONVERSATIONS]}


#: Conversations that the state lists; /api/conversations has all.
SHOWN_CONVERSATIONS = 20


def conversation_views(call: Call):
    """[{...}, ...]: the conversations whose cache lives, the latest first."""
    failover = call.app.failover
    started = failover.now() - failover.clock()
    return [{'conversation': digest[:8], 'client': warm.client, 'model': asked,
             'upstream_model': warm.model, **shown_ref(warm.ref),
             'since': utc_text(started + warm.since), 'turns': warm.turns, 'moves': warm.moves,
             'why': warm.why, 'tokens_read': warm.read, 'tokens_written': warm.written,
             'cache_ms': round(left_s * 1000)}
            for digest, asked, warm, left_s in failover.conversations.snapshot() if left_s]


def shown_ref(ref):
    """A key's ref and id; a client's own login is called so, whoever's it is."""
    kind, _, id = ref.partition(':')
    return {'ref': kind, 'key': kind} if kind == CLIENT_REF else {'ref': ref, 'key': id}


def api_events(call: Call):
    """Server-sent events: the configuration and the state, then each change."""
    app, response = call.app, call.response
    with app.bus.subscription() as subscription:
        response.start(200, [*STREAM_FIELDS, *OWN_FIELDS[1:]])
        response.write(sse_event('config', json.dumps(config_view(call.config))))
        reporter = StatusReporter(call)
        response.write(reporter.news())
        while not (app.stopping or subscription.is_over):
            news = subscription.next(STATUS_S)
            response.write((sse_event(*news) if news else b'') + reporter.news())
        response.finish()


#: How often a dashboard hears of the state at most, and of nothing at least.
STATUS_S, KEEP_ALIVE_S = 1, 15


class StatusReporter:
    """Reports the state to one dashboard: when it changed, and at most once in STATUS_S."""

    def __init__(self, call, clock=time.monotonic):
        self._call, self._clock = call, clock
        self._sent, self._sent_at, self._looked_at = None, -math.inf, -math.inf

    def news(self):
        """The bytes of an event, of a comment that keeps the connection alive, or none."""
        now = self._clock()
        if now - self._looked_at < STATUS_S:
            return b''
        self._looked_at = now
        status = full_status(self._call)
        lasting = without_clocks(status)
        if lasting == self._sent and now - self._sent_at < KEEP_ALIVE_S:
            return b''
        is_news, is_first = lasting != self._sent, self._sent is None
        self._sent, self._sent_at = lasting, now
        if not is_first:              # requests have their own events
            del status['recent']
        return sse_event('status', json.dumps(status)) if is_news else b': \n\n'


#: What changes by itself, and the requests, which have their own events.
CLOCKS = frozenset(('uptime_s', 'remaining_ms', 'until', 'asked_at', 'back_in_ms', 'recent',
                    'pace', 'spent_at', 'since', 'cache_ms'))


def without_clocks(status):
    if isinstance(status, list):
        return [without_clocks(entry) for entry in status]
    if isinstance(status, dict):
        return {name: without_clocks(value) for name, value in status.items()
                if name not in CLOCKS}
    return status


def sse_event(name, text):
    return f'event: {name}\ndata: {text}\n\n'.encode()


def api_logs(call: Call):
    """Query: count (100), level (the least that is wanted)."""
    count, level = call.query.get('count', '100'), call.query.get('level', LEVELS[0])
    if not re.fullmatch('[0-9]{1,5}', count):
        raise BadRequest('count must be a number.', field='count')
    if level not in LEVELS:
        raise BadRequest(f'level must be one of {", ".join(LEVELS)}.', field='level')
    call.app.log.flush()
    call.send_json({'logs': last_records(call.app.log.path, int(count), level)})


# -- cooldowns and keys --------------------------------------------------------------

def api_clear_cooldowns(call: Call):
    """Body: {} for all, {"key": ID} or {"key": ID, "model": NAME}."""
    wanted = call.json(key=check_text, model=check_text)
    key, model = wanted.get('key'), wanted.get('model')
    refs = refs_called(call.config, key) if key else [None]
    cleared = sum(call.app.cooldowns.clear(ref, model) for ref in refs)
    call.send_done('cooldowns_cleared', {'cleared': cleared}, key=key, model=model, count=cleared)


#: Keys' addresses begin with nothing for Anthropic's, with 'openai-' for OpenAI's.
PROVIDER_OF = {None: ANTHROPIC, 'openai-': OPENAI}


def key_ref(kind, id):
    return f'{PROVIDER_OF[kind]}:{urllib.parse.unquote(id)}'


def key_views(call: Call, *refs):
    """[{...}, ...]: keys with /health's fields and the Node program's."""
    keys = {key['ref']: key for key in call.app.health()['keys']}
    return [{**keys[ref], 'success': True, 'masked': keys[ref]['token'],
             'addedAt': keys[ref]['added_at'], 'requests': keys[ref]['answers'],
             'inCooldown': keys[ref]['state'] in ('cooling', 'limited')} for ref in refs]


def api_list_keys(call: Call, kind: str | None):
    """Query: profile, in whose order they come."""
    name, provider = call.query.get('profile', call.profile_name), PROVIDER_OF[kind]
    refuse_unknown_profile(call.config, name)
    ids = ids_in_order(call.config.profiles[name].order, provider)
    call.send_json({'keys': key_views(call, *(f'{provider}:{id}' for id in ids))})


def api_add_key(call: Call, kind: str | None):
    fields = call.json(token=check_text, label=check_text, baseUrl=check_base_url)

    def edit(config):
        edited, key = add_key(config, PROVIDER_OF[kind], wanted_field(fields, 'token'),
                              fields.get('label', ''), utc_text(time.time()),
                              fields.get('baseUrl'))
        refuse_moved_tokens(config, edited, {})
        return edited, key
    _, key = call.app.update(edit)
    call.send_done('key_added', key_views(call, key.ref)[0], 201, key=key.ref)


def api_edit_key(call: Call, kind: str | None, id: str):
    ref, fields = key_ref(kind, id), call.json(token=check_text, label=check_text,
                                               baseUrl=check_text)
    if fields.get('baseUrl') == '':
        fields['baseUrl'] = None      # back to the general one

    def edit(config):
        edited = edit_key(config, ref, fields)
        refuse_moved_tokens(config, edited, {ref: fields.get('token', '')})
        return edited
    call.app.update(edit)
    call.send_done('key_changed', key_views(call, ref)[0], key=ref, fields=list(fields))


#: The providers' own servers: nobody who reaches this API gains by what is sent there.
PUBLIC_SERVERS = frozenset(s.default for s in SETTINGS if s.check is check_base_url)


def refuse_moved_tokens(config, edited, known):
    """Raises BadRequest where a token would go to another server and is not among `known`, {ref:
    token}: whoever reaches this API could have all tokens sent to a server of theirs.  What a file
    or a new variable holds could be any login of this machine, and that of a file another one
    tomorrow: to know it is not enough."""
    unproved = []
    for ref, key in edited.keys.items():
        before = config.keys.get(ref)
        was_there = before is not None and before.token == key.token
        old, new = servers_of(config, before) if was_there else set(), servers_of(edited, key)
        can_be_proved = not is_reference(key.token) or was_there and key.token.startswith('env:')
        others = set() if can_be_proved else new - PUBLIC_SERVERS - old
        if others:
            command = f'add-{"openai-" if key.provider == OPENAI else ""}key'
            raise BadRequest(f'{key.token} would be sent to {" or ".join(others)}, which no '
                             f'request may cause: do it with {RUN} {command} or {RUN} config '
                             'set, or in the configuration file.', field='token')
        if was_there and new != old and not knows_token(key, known.get(ref, '')):
            unproved.append(ref)
    if unproved:
        raise BadRequest(f'Enter the token of {", ".join(unproved)} again: it would go to another '
                         f'server. Or change it in the file, with {RUN} config set.',
                         field='tokens', keys=unproved)


def servers_of(config, key):
    """Base URLs where a key's requests may go: a file or variable may come to hold a login."""
    may_be_login = key.provider == OPENAI and not key.base_url and is_reference(key.token)
    return {server_of(config, key), *([config.codex_base_url] if may_be_login else ())}


def knows_token(key, token):
    try:
        return is_same_secret(read_token(key.token), token.strip())
    except TokenUnavailable:
        return False


def api_remove_key(call: Call, kind: str | None, id: str):
    ref = key_ref(kind, id)
    call.app.update(lambda config: remove_key(config, ref))
    call.send_done('key_removed', key=ref)


def api_order_keys(call: Call, kind: str | None):
    field = ORDER_FIELDS[PROVIDER_OF[kind]]
    fields = call.json(**{field: check_texts, 'profile': check_text})
    name, ids = fields.get('profile', call.profile_name), wanted_field(fields, field)
    call.app.update(lambda config: order_keys(config, name, PROVIDER_OF[kind], ids))
    call.send_done('keys_ordered', profile=name)


class KeyTest(NamedTuple):
    is_valid: bool
    status: int               # 0: no answer
    message: str
    ms: int
    url: str


def test_key(config: Config, key: Key, upstream: Upstream, exchange: Exchange,
             clock=time.monotonic, now=time.time) -> KeyTest:
    """Asks a key's server for its list of models, which costs nothing."""
    started, url = clock(), ''

    def tested(is_valid, status, message):
        return KeyTest(is_valid, status, redact(message), round((clock() - started) * 1000), url)
    try:
        token = read_usable_token(key, now())
        target = find_target(config, key, token, None)
        wanted = build_key_test(target, key, token)
        url = f'{wanted.base.scheme}://{wanted.base.host_field}{models_path(target)}'
        with contextlib.closing(upstream.open(wanted, exchange, CONNECT_S)) as response:
            message = read_error(response.read_all(MAX_ERROR_BODY_BYTES)).message
    except TokenUnavailable as error:
        return tested(False, 0, str(error))
    except (UpstreamUnreachable, UpstreamCut, UpstreamTimeout) as error:
        return tested(False, 0, str(error) or 'no answer in time')
    message, status = message.replace(token, mask_token(token)), response.status
    if status < 300:
        return tested(True, status, 'the key is accepted')
    if status in (404, 405):          # a compatible server without such a list
        return tested(True, status, 'the server has no list of models, but did not refuse the key')
    return tested(status == 429, status, message or 'refused')


def api_test_key(call: Call, kind: str | None, id: str):
    config, ref = call.config, key_ref(kind, id)
    call.json()
    if ref not in config.keys:
        raise UnknownKey(urllib.parse.unquote(id))
    with call.app.watcher.watching(Exchange(call.connection.sock)) as exchange:
        tested = test_key(config, config.keys[ref], call.app.upstream, exchange)
    call.app.log.info('key_tested', key=ref, status=tested.status, message=tested.message[:300])
    call.send_json({'id': config.keys[ref].id, 'valid': tested.is_valid, **tested._asdict()})


# -- profiles and settings ---------------------------------------------------------

ORDER_CHECKS = dict.fromkeys((*ORDER_FIELDS.values(), 'priorityOrder'), check_texts)
PROFILE_CHECKS = {'name': check_text, 'port': whole_number(1, 'a port'), **ORDER_CHECKS,
                  'strategy': one_of(*STRATEGIES)}


def profile_view(profile):
    orders = {field: ids_in_order(profile.order, provider)
              for provider, field in ORDER_FIELDS.items()}
    return {'name': profile.name, 'port': profile.port, **orders,
            'priorityOrder': list(profile.order), 'strategy': profile.strategy}


def api_add_profile(call: Call):
    fields = call.json(**PROFILE_CHECKS)
    name, port = wanted_field(fields, 'name').strip(), fields.pop('port', None)
    others = {field: value for field, value in fields.items() if field != 'name'}

    def edit(config):
        edited = add_profile(config, name, port, others)
        call.app.refuse_taken_port(edited.profiles[name].port)
        return edited
    config = call.app.update(edit)
    call.send_done('profile_added', profile_view(config.profiles[name]), 201, profile=name)


def api_edit_profile(call: Call, name: str):
    name, fields = urllib.parse.unquote(name), call.json(**PROFILE_CHECKS)
    new_name = fields.get('name') or name
    changes = {field: value for field, value in fields.items() if field != 'priorityOrder'}

    def edit(config):
        edited = edit_profile(config, name, changes)
        if 'priorityOrder' in fields:
            edited = order_profile(edited, new_name, fields['priorityOrder'])
        if edited.profiles[new_name].port != config.profiles[name].port:
            call.app.refuse_taken_port(edited.profiles[new_name].port)
        return edited
    config = call.app.update(edit)
    call.send_done('profile_changed', profile_view(config.profiles[new_name]), profile=name,
                   fields=list(fields))


def api_remove_profile(call: Call, name: str):
    name = urllib.parse.unquote(name)
    if name == call.profile_name:
        raise BadRequest(f'Profile {name} is the one by whose port you are here: remove it from '
                         "another profile's dashboard.", 409)
    call.app.update(lambda config: remove_profile(config, name))
    call.send_done('profile_removed', profile=name)


def api_order_profile(call: Call):
    fields = call.json(profile=check_text, priorityOrder=check_texts)
    name = fields.get('profile', call.profile_name)
    order = wanted_field(fields, 'priorityOrder')
    call.app.update(lambda config: order_profile(config, name, order))
    call.send_done('profile_ordered', profile=name)


def setting_values(config: Config) -> dict:
    """{name: value} of every setting, the access token masked."""
    values = {setting.name: getattr(config, attribute_name(setting.name)) for setting in SETTINGS}
    return {**values, 'accessToken': config.access_token and mask_token(config.access_token)}


def config_view(config: Config) -> dict:
    fields = [{'name': s.name, 'default': s.default, 'unit': s.unit, 'help': s.help}
              for s in SETTINGS]
    return {'settings': setting_values(config), 'fields': fields,
            'profiles': list(map(profile_view, config.profiles.values()))}


def api_change_config(call: Call):
    """Body: settings by name, null for a default; `tokens` where a base URL changes."""
    changes = call.raw_json()
    tokens = changes.pop('tokens', {})
    if not isinstance(tokens, dict) or not all(isinstance(t, str) for t in tokens.values()):
        raise BadRequest('tokens must be an object of texts.', field='tokens')

    def edit(config):
        edited = change_settings(config, changes)
        refuse_moved_tokens(config, edited, tokens)
        return edited
    config = call.app.update(edit)
    # An access token must not lock out who has just set it.
    cookies = session_cookies(config.access_token if 'accessToken' in changes else None)
    call.send_done('config_changed', setting_values(config), 200, cookies, fields=list(changes))


# -- the tools of this machine -------------------------------------------------------

def api_setup_status(call: Call):
    setup = ToolSetup(call.app.store.path)
    ours = own_values(call.config, call.app.ports())
    tools = {state.tool.id: {
        'name': state.tool.name, 'path': state.path, 'installed': state.is_found,
        'configured': state.url in ours, 'url': state.url,
        'note': state.problem and f'{tilde(state.path)} {state.problem}.'}
        for state in setup.states()}
    cursor = {'name': 'Cursor', 'path': None, 'installed': setup.has_cursor(), 'configured': False,
              'url': None, 'note': CURSOR_NOTE}
    call.send_json({**tools, 'cursor': cursor, 'autostart': autostart_view(call)})


def autostart_view(call: Call):
    try:
        autostart, note = find_autostart(call.app.store.path), None
    except FailoverError as error:
        autostart, note = None, str(error)
    manager, path = autostart[:2] if autostart else (None, None)
    return {'name': 'Start at login', 'manager': manager, 'path': path, 'note': note,
            'installed': bool(path) and os.path.exists(path),
            'loaded': bool(manager) and os.environ.get(STARTED_BY) == manager}


def api_setup(call: Call, target: str):
    """Body: {"undo": true} restores the tool's file; {"profile": NAME} uses its port."""
    fields = call.json(undo=check_switch, profile=check_text)
    if target in LOGIN_TARGETS:
        return call.send_json(set_autostart(call, target == 'autostart'))
    setup = ToolSetup(call.app.store.path)
    tools = [tool for tool in TOOLS if tool.id == target]
    if target == 'auto':
        tools = [state.tool for state in setup.states() if state.is_found and not state.problem]
    elif not tools:
        known = ', '.join((*TOOL_IDS, 'auto', *LOGIN_TARGETS))
        raise BadRequest(f'There is no target {printable(target)[:60]!r}. There are: {known}.',
                         404, 'not_found_error')
    actions = [{'target': change.tool.id, 'changed': int(change.is_change),
                'message': f'{change.tool.name}: {tilde(change.path)} {change.text}.'}
               for change in map(edit_from_page(call, setup, fields), tools)]
    message = '\n'.join(action['message'] for action in actions)
    answer = {'changed': sum(action['changed'] for action in actions), 'actions': actions,
              'message': message or 'No tool was found here that is not set up.'}
    return call.send_done('setup', answer, target=target, message=message)


def edit_from_page(call: Call, setup, fields):
    """The edit that a page asks for: a function of a tool that gives a Change."""
    config, ports = call.config, call.app.ports()
    if fields.get('undo'):
        return functools.partial(setup.undo, ours=own_values(config, ports))
    name = fields.get('profile', call.profile_name)
    refuse_unknown_profile(config, name)
    if not ports.get(name):
        raise BadRequest(f'Profile {name} has no open port.', 409, field='profile')
    return functools.partial(setup.configure, url=local_url(ports[name]),
                             access_token=config.access_token)


#: These leave the running proxy as it is: it is what answers.
LOGIN_TARGETS = ('autostart', 'remove-autostart')


def set_autostart(call: Call, is_wanted: bool):
    autostart = find_autostart(call.app.store.path)
    if is_wanted:
        has_changed, problem = start_at_login(autostart)
        message = (f'Wrote {tilde(autostart.path)}, but {autostart.manager} cannot be reached '
                   f'here ({problem}).' if problem else
                   f'{autostart.manager} starts it from the next login on.')
    else:
        has_changed = start_at_no_login(autostart)
        message = 'It does not start at login any more; this one keeps running.'
    return {'success': True, 'changed': int(has_changed), 'message': message}


# ==============================================================================
# HTTP server
# ==============================================================================
# Loopback is no boundary: any web page can send requests.  So each passes the guard first.

#: Joined by a comma, two Hosts are neither a name nor a port.
HOST_AND_PORT = re.compile(r'\A([^:,]+|\[[^\],]+\]):[0-9]{1,5}\Z')


@functools.lru_cache(maxsize=64)
def own_hosts(port):
    names = ('localhost', LISTEN_HOST, '[::1]')
    return frozenset((*names, *(f'{name}:{port}' for name in names)))


def guard(head, port, config):
    """Raises Forbidden for a request that another site's page, or a rebound name, sent."""
    headers = head.headers
    host = headers.get('host', '')
    name = HOST_AND_PORT.sub(r'\1', host)         # one allowed without a port allows each
    if host.lower() not in own_hosts(port) and {host, name}.isdisjoint(config.allowed_hosts):
        raise Forbidden(f'The Host {printable(host)[:80]!r} is not this proxy: use '
                        f'{local_url(port)}, or add it to "allowedHosts".')
    origin = headers.get('origin')
    is_allowed = origin in config.allowed_origins
    if origin is not None and not is_allowed and origin != f'http://{host}':
        raise Forbidden('Requests from web pages of another origin are refused; '
                        '"allowedOrigins" adds one.')
    if not is_allowed and headers.get('sec-fetch-site', 'none') not in ('same-origin', 'none'):
        raise Forbidden('Requests from another site are refused.')


#: From linux/netlink.h and linux/sock_diag.h.
NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST = 4, 20, 1
#: Tables of sockets, and what precedes an address of a family there: a client's IPv6 socket may
#: have reached ours by ::ffff:127.0.0.1.
MAPPED = '0' * 16 + ('FFFF0000' if sys.byteorder == 'little' else '0000FFFF')
SOCKET_TABLES = {
    socket.AF_INET: (('/proc/net/tcp', ''), ('/proc/net/tcp6', MAPPED)),
    socket.AF_INET6: (('/proc/net/tcp6', ''),)}


def peer_owner(sock):
    """The user id of the program at the other end of a local connection; None where the system
    does not say.  Raises ClientGone when it has left: what it left may pass as root's."""
    if not sys.platform.startswith('linux'):
        return None
    try:
        near, far = sock.getsockname(), sock.getpeername()
    except OSError as error:
        raise ClientGone from error
    found = ask_for_owner(far, near) or look_for_owner(far, near)
    if found and found[1]:
        return found[0]
    if found or departed([sock]):
        raise ClientGone
    return None                       # a sandbox without the tables


def address_family(address):
    return socket.AF_INET6 if ':' in address[0] else socket.AF_INET


def address_bytes(address):
    return socket.inet_pton(address_family(address), address[0])


def ask_for_owner(far, near):
    """(user id, inode) of the socket at `far`, inode 0 when nobody holds it; None for none."""
    request = struct.pack('=IHHIIBBxxI', 72, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, 0, 0,
                          address_family(far), socket.IPPROTO_TCP, 0xffffffff)
    request += struct.pack('!HH16s16s', far[1], near[1], address_bytes(far), address_bytes(near))
    request += struct.pack('=I8s', 0, b'\xff' * 8)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_SOCK_DIAG) as netlink:
            netlink.send(request)
            return read_diag_answer(netlink.recv(4096, socket.MSG_DONTWAIT))
    except OSError:                   # not allowed here, or unknown to this kernel
        return None


def read_diag_answer(data):
    """(user id, inode) in the kernel's answer; None in an error's."""
    if len(data) < 88 or struct.unpack_from('=H', data, 4)[0] != SOCK_DIAG_BY_FAMILY:
        return None
    return struct.unpack_from('=II', data, 80)


def look_for_owner(far, near):
    """The same from the tables in /proc: some milliseconds where thousands of sockets are open."""
    for path, prefix in SOCKET_TABLES[address_family(far)]:
        with contextlib.suppress(OSError), open(path) as file:        # no /proc, or no IPv6
            found = find_in_table(file.read(), prefix + table_address(far),
                                  prefix + table_address(near))
            if found:
                return found
    return None


def table_address(address):
    """('127.0.0.1', 8080) as '0100007F:1F90': four bytes at a time, in this machine's order."""
    numbers = struct.iter_unpack('=I', address_bytes(address))
    return f'{"".join(f"{number:08X}" for number, in numbers)}:{address[1]:04X}'


def find_in_table(text, far, near):
    """(user id, inode) of a socket in the text of /proc/net/tcp; addresses as they stand there."""
    for line in text.splitlines():
        words = line.split()
        if words[1:3] == [far, near] and len(words) > 9:
            return int(words[7]), int(words[9])
    return None


def refuse_stranger(owner, config):
    """Raises Forbidden for another user's program, but root's; an access token decides instead."""
    if owner not in (None, 0) and owner != os.geteuid() and not config.access_token:
        raise Forbidden(f'This {PROGRAM} serves the user who started it. With an "accessToken" in '
                        'its configuration it also serves others who present that.')


def check_access(route, headers, access_token):
    """Raises BadRequest where the access token is asked for and not presented."""
    if not (route.is_open or not access_token
            or route.takes_session and has_session(headers, access_token)
            or any(presents(headers.get(name, ''), access_token)
                   for name in ('x-api-key', 'authorization'))):
        raise BadRequest('The access token is missing or wrong: send the configuration\'s '
                         '"accessToken" as the API key or as a Bearer token.', 401,
                         'authentication_error')


@functools.lru_cache(maxsize=64)
def media_types(value):
    """{'application/json'}: of a Content-Type field, or of several that were joined."""
    return frozenset(part.partition(';')[0].strip().lower() for part in value.split(','))


def forward(call: Call):
    request = ClientRequest(call.head, call.body, call.profile_name, call.config.access_token)
    with call.app.watcher.watching(Exchange(call.connection.sock)) as exchange:
        Serving(call.app.failover, request, call.response, exchange).serve()


class Route(NamedTuple):
    methods: tuple
    pattern: re.Pattern       # of the path, matched whole; its groups are the answer's arguments
    answer: Callable
    is_open: bool = False     # answers without the access token
    takes_session: bool = True        # or with the cookie of a dashboard


def route(methods, pattern, answer, **options):
    return Route(tuple(methods.split()), re.compile(pattern), answer, **options)


ROUTES = (
    route('GET POST PUT PATCH DELETE HEAD', '/v1/.+', forward, takes_session=False),
    route('HEAD GET', '/', show_start_page, is_open=True),
    route('HEAD GET', '/dashboard(?:/.*)?', show_dashboard, is_open=True),
    route('HEAD GET', '/health', lambda call: call.send_json(call.app.health())),
    route('HEAD GET', '/api/status', api_status),
    route('GET', '/api/events', api_events),
    route('HEAD GET', '/api/conversations',
          lambda call: call.send_json({'conversations': conversation_views(call)})),
    route('HEAD GET', '/api/logs', api_logs),
    route('POST', '/api/login', api_login, is_open=True),
    route('POST', '/api/login-code',
          lambda call: call.send_json({'code': call.app.login_codes.make()})),
    route('HEAD GET', '/api/(openai-)?keys', api_list_keys),
    route('POST', '/api/(openai-)?keys', api_add_key),
    route('PUT', '/api/(openai-)?keys/reorder', api_order_keys),
    route('PUT', '/api/(openai-)?keys/([^/]+)', api_edit_key),
    route('DELETE', '/api/(openai-)?keys/([^/]+)', api_remove_key),
    route('POST', '/api/(openai-)?keys/([^/]+)/test', api_test_key),
    route('HEAD GET', '/api/profiles', lambda call: call.send_json(
        {'profiles': config_view(call.config)['profiles']})),
    route('POST', '/api/profiles', api_add_profile),
    route('PUT', '/api/profiles/priority', api_order_profile),
    route('PUT', '/api/profiles/([^/]+)', api_edit_profile),
    route('DELETE', '/api/profiles/([^/]+)', api_remove_profile),
    route('HEAD GET', '/api/config', lambda call: call.send_json(setting_values(call.config))),
    route('PUT', '/api/config', api_change_config),
    route('POST', '/api/cooldowns/clear|/clear-cooldowns', api_clear_cooldowns),
    route('HEAD GET', '/api/setup/status', api_setup_status),
    route('POST', '/api/setup/([^/]+)', api_setup),
)
#: For every path; never forwarded.
OPTIONS_ROUTE = route('OPTIONS', '/.*', lambda call, allow: call.response.send(
    204, [allow, *OWN_FIELDS]), is_open=True)


def find_route(head):
    """(Route, its arguments) of a request.  Raises BadRequest, 404 or 405."""
    path, methods = head.target.partition('?')[0], []
    for candidate in ROUTES:
        match = candidate.pattern.fullmatch(path)
        if match and head.method in candidate.methods:
            return candidate, match.groups()
        if match:
            methods += candidate.methods
    if not methods:
        raise BadRequest(f'There is nothing at {printable(path)[:100]}; the API is below /v1/.',
                         404, 'not_found_error')
    allow = ('allow', ', '.join(dict.fromkeys([*methods, 'OPTIONS'])))
    if head.method == 'OPTIONS':
        return OPTIONS_ROUTE, (allow,)
    raise BadRequest(f'{path} takes {" and ".join(dict.fromkeys(methods))}.', 405, fields=[allow])


class Handler(socketserver.BaseRequestHandler):
    """Serves the requests of one client connection, one after another."""
    server: Any               # a Listener

    def handle(self):
        try:
            self._owner = peer_owner(self.request)
        except ClientGone:
            return
        connection = ClientConnection(self.request)
        while self._serve_one(connection):
            pass

    def _serve_one(self, connection):
        """Reads and answers one request; whether another may follow."""
        response, was_read = ClientResponse(connection, None), False
        try:
            # Before waiting, so that strangers hold no thread; and again when a request is there.
            refuse_stranger(self._owner, self.server.app.store.current)
            head = connection.read_head()
            if head is None:
                return False
            response = ClientResponse(connection, head)
            profile_name = self.server.profile_name
            route, arguments = self._admit(head, profile_name)
            if 'expect' in head.headers and head.minor_version:
                connection.send(b'HTTP/1.1 100 Continue\r\n\r\n')
            body = connection.read_body(head)
            was_read = True
            call = Call(self.server.app, head, body, response, profile_name, connection)
            route.answer(call, *arguments)
        except FailoverError as error:
            self._refuse(connection, response, error, was_read)
        except ClientGone:
            return False
        except Exception as error:    # a thread's top: one request must not take others down
            kind = type(error).__name__
            self.server.app.log.error('internal_error', kind=kind, at=where_raised(error))
            if response.started:
                return False
            self._refuse(connection, response, FailoverError(
                f'{PROGRAM} failed on this request ({kind}); its log says where.'), was_read)
        return response.keep_alive and not self.server.app.stopping

    def _admit(self, head, profile_name):
        """(Route, its arguments) of a request that may be answered.  Raises BadRequest."""
        config = self.server.app.store.current
        refuse_stranger(self._owner, config)
        guard(head, self.server.server_port, config)
        route, arguments = find_route(head)
        check_access(route, head.headers, config.access_token)
        types = media_types(head.headers.get('content-type', ''))     # JSON is no web page's form
        is_file = types == {'multipart/form-data'} and head.target.startswith('/v1/')
        has_body = head.is_chunked or head.length
        if has_body and types != {'application/json'} and not is_file:
            raise BadRequest('The body must be sent with content-type: application/json.', 415)
        if head.length > MAX_BODY_BYTES:
            raise too_large()
        if profile_name not in config.profiles:
            raise BadRequest(f'The profile {profile_name} is gone.', 404, 'not_found_error')
        return route, arguments

    def _refuse(self, connection, response, error, was_read):
        if response.started:
            return
        response.keep_alive = response.keep_alive and was_read
        self.server.app.log.debug('refused', status=error.status, message=str(error))
        fields = [JSON_TYPE, ('request-id', new_request_id()), *OWN_FIELDS, *error.fields]
        try:
            response.send(error.status, fields,
                          error_json(error.type, str(error), **error.details))
        except ClientGone:
            return
        if not response.keep_alive:
            connection.drain()


IDLE_WORKERS = 32             # threads that wait for the next connection


class Workers:
    """Threads that are reused: starting one takes a quarter of a short connection's time."""

    def __init__(self):
        self._lock = threading.Lock()
        self._idle = 0                # threads that wait, less the jobs that wait for them
        self._jobs = queue.SimpleQueue()

    def run(self, job):
        """Has an idle or new thread call `job()`.  Raises RuntimeError when there can be none."""
        with self._lock:
            is_one_idle = self._idle > 0
            self._idle -= is_one_idle
        if is_one_idle:
            return self._jobs.put(job)
        return threading.Thread(target=self._work, args=(job,), name='worker', daemon=True).start()

    def _work(self, job):
        while True:
            job()
            del job                   # it holds a connection
            with self._lock:
                if self._idle >= IDLE_WORKERS:
                    return
                self._idle += 1
            job = self._jobs.get()


class LocalServer(http.server.ThreadingHTTPServer):
    request_queue_size = 1024     # the default of 5 drops connections under load: 1 s and more

    def server_bind(self):
        # HTTPServer's looks up the host's full name, which takes seconds where DNS is broken.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.socket.getsockname()[:2]


class Listener(LocalServer):
    """The port of one profile, on 127.0.0.1 and ::1: a thread for each connection."""

    def __init__(self, profile: Profile, app: Parts, workers: Workers):
        self.profile_name, self.wanted_port, self.app = profile.name, profile.port, app
        self._workers, self._is_closing = workers, False
        super().__init__((LISTEN_HOST, profile.port), Handler)
        self._sockets = [self.socket]
        try:
            self._sockets.append(socket.create_server(
                ('::1', self.server_port), family=socket.AF_INET6,
                backlog=self.request_queue_size))
        except OSError as error:      # no IPv6, or the port is another's there: IPv4 is enough
            app.log.debug('no_ipv6', port=self.server_port, reason=error_reason(error))

    def serve_forever(self, poll_interval=None):
        """Accepts until `shutdown`."""
        for sock in self._sockets[1:]:
            threading.Thread(target=self._accept, args=(sock,), name='listen', daemon=True).start()
        self._accept(self.socket)

    def _accept(self, sock):
        """Blocked in accept: nothing wakes while nobody comes."""
        while not self._is_closing:
            try:
                request, client_address = sock.accept()
            except OSError:
                # The end, or no file descriptor left: others will close theirs.
                time.sleep(0 if self._is_closing else 0.05)
                continue
            self._begin(request, client_address)

    def shutdown(self):
        self._is_closing = True
        for sock in self._sockets:
            with contextlib.suppress(OSError):    # macOS: "not connected"; closing wakes it
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _begin(self, request, client_address):
        if self.app.slots.acquire(blocking=False):
            try:
                return self._workers.run(functools.partial(
                    self.process_request_thread, request, client_address))
            except RuntimeError:      # the system gives no further thread
                self.app.slots.release()
        with contextlib.suppress(OSError):        # it may be gone by now
            request.sendall(TOO_MANY)
        self.shutdown_request(request)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.app.slots.release()

    def handle_error(self, request, client_address):
        error = sys.exc_info()[1]
        self.app.log.error('connection_failed', kind=type(error).__name__, at=where_raised(error))


TOO_MANY_BODY = error_json('overloaded_error', f'{PROGRAM}: over {MAX_CONNECTIONS} connections.')
TOO_MANY = (b'HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n'
            b'connection: close\r\ncontent-length: %d\r\n\r\n%b'
            % (len(TOO_MANY_BODY), TOO_MANY_BODY))


# ==============================================================================
# Service
# ==============================================================================

#: Memory is given back with the first of so many looks: 5 s after the start, then each 10 min.
TURNS_TO_TRIM = 120


class PortTaken(FailoverError):
    """A profile's port could not be opened."""


def return_memory():
    """Gives free memory back to the system, where the C library can (glibc): compiling this file
    leaves 20 MB of 42, and each thread's heap keeps the most it ever held."""
    import ctypes
    with contextlib.suppress(AttributeError, OSError, TypeError):     # other systems
        ctypes.CDLL(None).malloc_trim(0)


def polling(patience_s: float) -> Iterator[None]:
    """Yields now and every POLL_S, until so many seconds have passed."""
    deadline = time.monotonic() + patience_s
    yield
    while time.monotonic() < deadline:
        time.sleep(POLL_S)
        yield


class App(Parts):
    """The parts put together: built once, started, reloaded, stopped."""

    def __init__(self, config_path: str, upstream: Upstream | None = None):
        self.store = ConfigStore(config_path)
        self.store.load()
        config = self.store.current
        self.bus = EventBus()
        self.log = JsonLog(log_path(config_path), config.log_level, config.max_log_size,
                           bus=self.bus)
        self.metrics = Metrics()
        self.login_codes = LoginCodes()
        self.cooldowns = Cooldowns()
        self.watcher = Watcher()
        self.upstream = upstream or Upstream()
        self.carrier = StreamCarrier() if hasattr(socket, 'MSG_DONTWAIT') else None     # Windows
        self.failover = Failover(self.store, self.cooldowns, self.upstream,
                                 Journal(self.log, self.metrics, self.bus), self.carrier)
        self.state = State(self.store, self.log, [
            self.cooldowns, self.failover.conversations, self.metrics, self.failover])
        self.slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._workers = Workers()
        self.listeners = {}           # profile name -> Listener
        self.port_problems = {}       # profile name -> why its port is not open
        self.stopping = False
        self._applied = config        # the Config that ports, log and cooldowns follow
        self._applying = threading.Lock()
        self.pid_file = PidFile(config_path)      # acquired by who starts the App
        self._stop = threading.Event()
        self._started = time.monotonic()
        self._tls_thread = threading.Thread(target=self.upstream.tls_context, name='tls',
                                            daemon=True)

    def start(self) -> None:
        """Opens every profile's port.  Raises PortTaken, with none left open."""
        self.state.load()
        self._open_listeners()
        if self.port_problems:
            self._close_listeners(self.listeners.values())
            raise PortTaken(' '.join(self.port_problems.values()))
        self.log.start()
        self.watcher.start()
        if self.carrier:
            self.carrier.start()
        self._tls_thread.start()
        threading.Thread(target=self._reload_loop, name='reload', daemon=True).start()
        threading.Thread(target=self._save_loop, name='state', daemon=True).start()
        self.log.info('started', version=VERSION, pid=os.getpid(), ports=self.ports())

    def ports(self) -> dict:
        return {name: listener.server_port for name, listener in self.listeners.items()}

    def _open_listeners(self):
        """Brings the open ports in line with the configuration.  A port that stays open keeps its
        connections, whatever profile has it now; a profile keeps its port if the new one is taken.
        """
        before, wanted = self.listeners, self.store.current.profiles
        by_port = {listener.server_port: listener for listener in before.values()}
        kept = {name: by_port[profile.port] for name, profile in wanted.items()
                if profile.port and profile.port in by_port}
        kept.update({name: before[name] for name, profile in wanted.items()
                     if not profile.port and name in before and not before[name].wanted_port})
        self.port_problems = {}
        listeners = {}
        for name, profile in wanted.items():
            listeners[name] = kept.get(name) or self._open_listener(profile)
            if not listeners[name] and before.get(name) not in kept.values():
                listeners[name] = before.get(name)
        self.listeners = {name: opened for name, opened in listeners.items() if opened}
        if not before and self.port_problems:
            return                    # this start fails
        for name, listener in self.listeners.items():
            listener.profile_name, listener.wanted_port = name, wanted[name].port
        self._close_listeners(set(before.values()) - set(self.listeners.values()))
        self._note_ports()

    def _open_listener(self, profile):
        """A new Listener, or None with the reason among `port_problems`."""
        try:
            listener = Listener(profile, self, self._workers)
        except OSError as error:
            self.port_problems[profile.name] = (f'Port {profile.port} of profile {profile.name} '
                                                f'cannot be opened ({error.strerror}).')
            return None
        threading.Thread(target=listener.serve_forever, name='listen', daemon=True).start()
        return listener

    def _close_all(self):
        listeners, self.listeners = self.listeners, {}
        self._close_listeners(listeners.values())
        self._note_ports()

    def _close_listeners(self, listeners):
        for listener in listeners:
            listener.shutdown()

    def _note_ports(self):
        with contextlib.suppress(OSError):        # commands then find it by its configuration
            self.pid_file.write(self.ports().values(), bool(self.store.current.document))

    def _reload_loop(self):
        for turn in itertools.count():
            if self._stop.wait(RELOAD_S):
                return
            try:
                self.reload()
                self.upstream.close_idle(POOL_IDLE_S)
                if turn % TURNS_TO_TRIM == 0:
                    return_memory()
            except Exception as error:        # a thread's top: the next look may go better
                self.log.error('reload_failed', kind=type(error).__name__, at=where_raised(error))

    def _save_loop(self):
        while not self._stop.wait(self.state.pause_s):
            self._save_state()
        self._save_state()            # a second signal would end the draining without it

    def _save_state(self):
        try:
            self.state.save()
        except Exception as error:            # a help, never a need: not for the stop either
            self.log.error('save_failed', kind=type(error).__name__, at=where_raised(error))

    def reload(self):
        """Puts a changed file in force; opens ports that could not be opened before."""
        try:
            has_changed = self.store.reload_if_changed()
        except ConfigError as error:          # the folder cannot be read: log that once
            has_changed = self.store.problem != str(error)
            self.store.problem = str(error)
        if has_changed and self.store.problem:
            self.log.error('config_refused', message=self.store.problem)
        self._apply()

    def update(self, edit):
        """What the edit gave, saved and in force.  Raises FailoverError with nothing changed."""
        outcome = self.store.update(edit)
        self._apply()
        return outcome

    def _apply(self):
        """Brings all that follows from the configuration in line with it."""
        with self._applying:
            before, config = self._applied, self.store.current
            if config is not before:
                self._applied = config
                self.log.configure(config.log_level, config.max_log_size)
                self._end_outdated_cooldowns(before, config)
                self.log.info('config_reloaded', profiles=len(config.profiles),
                              keys=len(config.keys))
            if config is not before or self.port_problems:
                known = self.port_problems
                self._open_listeners()
                for name in self.port_problems.keys() - known.keys():
                    self.log.error('port_not_opened', profile=name,
                                   message=self.port_problems[name])
            for notice in self.store.take_notices():
                self.log.warn('config_notice', message=notice)
        if config is not before:
            self.bus.publish('config', json.dumps(config_view(config)))

    def _end_outdated_cooldowns(self, before, config):
        has_moved = BASE_URLS(config) != BASE_URLS(before)
        for ref, key in before.keys.items():
            now = config.keys.get(ref)
            if has_moved or now is None or now._replace(label=key.label) != key:
                self.cooldowns.clear(ref)
        self.cooldowns.wake_all()

    def refuse_taken_port(self, port):
        """Raises BadRequest when another program has a port that a profile is to get."""
        if port in self.ports().values():
            return                    # our own: the configuration says whether it is free
        try:
            socket.create_server((LISTEN_HOST, port)).close()
        except OSError as error:
            raise BadRequest(f'Port {port} cannot be opened ({error.strerror}): choose another.',
                             409, field='port') from error

    def run(self):
        """Serves until `stop`; running answers have DRAIN_S to finish."""
        self._stop.wait()
        self.stopping = self.failover.stopping = True
        self._close_all()
        self.cooldowns.wake_all()
        for _ in polling(DRAIN_S):
            if not len(self.watcher):
                break
        self.upstream.close_idle()
        self._save_state()
        self._tls_thread.join()       # as the interpreter ends, OpenSSL goes: not under a thread
        self.log.info('stopped', cut=len(self.watcher))
        self.log.close()
        self.pid_file.release()

    def stop(self):
        self._stop.set()

    def health(self) -> dict:
        """What /health reports: tokens only masked."""
        config = self.store.current
        cooling = self.cooldowns.snapshot()
        cooled = [(c, cooled_refs(config, c)) for c, _ in cooling]
        metrics, recent = self.metrics.snapshot()
        keys = [self._key_health(key, cooled, metrics) for key in config.keys.values()]
        log_problem = f'The log {self.log.path} cannot be written.' if self.log.failed else None
        problems = [problem for problem in (self.store.problem, log_problem,
                                            *self.port_problems.values()) if problem]
        unusable = {key['ref'] for key in keys if key['problem']}
        ports = self.ports()
        profiles = [{'name': name, 'port': ports.get(name),
                     'url': local_url(ports[name]) if name in ports else None,
                     'order': profile.order, 'strategy': profile.strategy,
                     'serving': profile_serving(config, profile, recent, cooling, unusable)}
                    for name, profile in config.profiles.items()]
        return {
            'status': health_status(profiles, keys, problems), 'program': PROGRAM,
            'version': VERSION, 'pid': os.getpid(),
            'uptime_s': round(time.monotonic() - self._started),
            'started_by': os.environ.get(STARTED_BY) or 'hand',
            'config': self.store.path, 'log': self.log.path, 'problems': problems,
            'profiles': profiles, 'keys': keys,
            'cooldowns': [cooldown_health(c, refs, *self.cooldowns.remaining_s(c))
                          for c, refs in cooled],
            'active': len(self.watcher), 'waiting': self.cooldowns.queue_length(),
            'metrics': metrics, 'recent': recent}

    def _key_health(self, key, cooled, metrics):
        mine = [c for c, refs in cooled if key.ref in refs]
        problem, (noted, limits) = token_problem(key), self.metrics.limits(key.ref)
        return {
            'ref': key.ref, 'id': key.id, 'label': key.label, 'provider': key.provider,
            'token': mask_token(key.token), 'type': 'oauth' if key.oauth else 'api-key',
            'base_url': key.base_url, 'added_at': key.added_at,
            'siblings': [other.ref for other in
                         self.failover.siblings(self.store.current, key)],
            'windows': [limit_health(limit, noted, key) for limit in limits],
            'windows_at': noted and utc_text(noted),
            'state': key_state(self.store.current, key, problem, mine), 'problem': problem,
            'needs_attention': any(c.outcome.rule.attention for c in mine),
            'answers': metrics['by_key'].get(key.ref, 0)}


def token_problem(key: Key) -> str | None:
    """Why a key's token cannot be used as it is, with what to do; None when it can."""
    try:
        read_usable_token(key, time.time())
    except TokenUnavailable as error:
        return str(error)
    return None


def key_state(config, key, problem, coolings):
    """'unused' (OpenAI's, while openaiModelFallback is off), 'no token' (where it should be
    read, or its login is over), 'cooling' (for every model), 'limited' (for some), 'ready'."""
    if not is_served(config, key):
        return 'unused'
    if problem:
        return 'no token'
    if any(cooling.model is None for cooling in coolings):
        return 'cooling'
    return 'limited' if coolings else 'ready'


def state_words(state: str) -> str:
    """A key's state as a person reads it."""
    return 'cooling for some models' if state == 'limited' else state


#: How many models /health reports on, and the last requests in which they are looked for.
MODELS_IN_USE, REQUESTS_IN_USE = 5, 30


def profile_serving(config, profile, recent, cooling, unusable):
    """Who serves each model in use, the one asked for most first: by the latest request it would
    jump.  A profile without requests has the others' models; one that nobody knows is not in use.
    """
    messages = [record for record in recent if record['path'] == MESSAGES_PATH
                and record['model'] and record['status'] != 404]
    mine = [record for record in messages if record['profile'] == profile.name]
    asked = collections.Counter(record['model'] for record in (mine or messages)[:REQUESTS_IN_USE])
    tried = {attempt['key'] for record in mine for attempt in record['attempts']}
    now = cooling, unusable, CLIENT_REF in tried
    return [serving_health(model, who_serves(config, profile, model, *now))
            for model, _ in asked.most_common(MODELS_IN_USE) or [(None, 0)]]


def serving_health(model, prospect):
    back_s = prospect.back_s
    return {'model': model, 'state': prospect.state, **attempt_health(prospect.attempt),
            'back_in_ms': None if back_s is None else round(back_s * 1000),
            'passed': [attempt_health(attempt) for attempt in prospect.passed],
            'next': prospect.next and attempt_health(prospect.next)}


def attempt_health(attempt) -> dict:
    if attempt is None:
        return dict.fromkeys(('key', 'ref', 'provider', 'upstream_model'))
    key = attempt.key
    return {'key': key.id, 'ref': CLIENT_REF if key.id == CLIENT_REF else key.ref,
            'provider': key.provider, 'upstream_model': attempt.model}


def health_status(profiles, keys, problems):
    """'problem' (configuration, port, log), 'no_keys' (the clients' own credentials are used),
    'exhausted' (nobody serves any model in use), 'ok'."""
    if problems:
        return 'problem'
    if not keys:
        return 'no_keys'
    states = {row['state'] for profile in profiles for row in profile['serving']}
    return 'ok' if 'ready' in states else 'exhausted'


def limit_health(limit, noted, key):
    """A Limit as it is now: one that has been reset has nothing used."""
    now, resets = time.time(), None if limit.resets_s is None else noted + limit.resets_s
    is_over = resets is not None and resets <= now
    used, resets = (0, None) if is_over else (limit.used, resets)
    pace, spent_at = window_pace(limit.name, used, resets and resets - now, now)
    is_minutes = key.provider == ANTHROPIC and limit.name.endswith(('requests', 'tokens'))
    return {'name': limit.name, 'used': round(used, 4),
            'length_s': 60 if is_minutes else window_length_s(limit.name),
            'resets_at': resets and utc_text(resets), 'status': None if is_over else limit.status,
            'pace': pace and round(pace, 4), 'spent_at': spent_at and utc_text(spent_at)}


def cooled_refs(config, cooling):
    """Refs of the keys that a cooldown concerns: of one, or of all at a server."""
    server = cooling.place.server
    return [key.ref for key in config.keys.values() if server_of(config, key) == server
            ] if server else [cooling.key.ref]


def cooldown_health(cooling, refs, left_s, ends_s):
    """`until`: when the limit itself ends; `asked_at`: it is tried again.  A server has no key."""
    now, server, key = time.time(), cooling.place.server, cooling.key
    return {'key': None if server else key.id, 'ref': None if server else key.ref,
            'server': server, 'refs': refs, 'model': cooling.model,
            'reason': cooling.outcome.rule.name, 'words': cooling.outcome.rule.words,
            'status': cooling.outcome.status, 'message': cooling.outcome.message[:300],
            'remaining_ms': round(left_s * 1000), 'total_ms': round(cooling.length_s * 1000),
            'until': utc_text(now + ends_s), 'asked_at': utc_text(now + left_s),
            'needs_attention': cooling.outcome.rule.attention}


class Running(NamedTuple):
    """The process that runs with a configuration, by its pid file."""
    pid: int
    ports: list = []
    is_configured: bool = False       # its configuration is more than the defaults
    namespace: str | None = None      # in which `pid` counts

    @property
    def is_here(self) -> bool:
        """Whether `pid` is that process here too, and may be sent a signal.  Without a namespace
        (as 1.0.0 wrote it) a 1 may be the system's first process."""
        return self.pid > 1 if self.namespace is None else self.namespace == pid_namespace()


def pid_namespace():
    """The kernel's name for the namespace of this process's number: each container has one.  None
    where there are none."""
    try:
        return os.readlink('/proc/self/ns/pid')
    except OSError:
        return None


class PidFile:
    """Says which process runs with a configuration, and at which ports: the configuration itself
    may be broken or changed by now, or leave the ports to the system.  That process keeps the
    file locked, so the file never names another one, however the process ended."""

    def __init__(self, config_path):
        self.path = os.path.join(os.path.dirname(config_path), f'{PROGRAM}.pid')
        self._file = None             # open, and locked, as long as this process runs

    def acquire(self, patience_s: float = 1.0) -> bool:
        """Locks the file for this process; False when another one has it."""
        make_private_folder(os.path.dirname(self.path))
        file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), 'r+b', buffering=0)
        for _ in polling(patience_s):
            if lock_file(file, is_shared=False):
                self._file = file
                self.write()
                return True
        file.close()
        return False

    def write(self, ports=(), is_configured=False):
        """Notes what is open by now, where this process has the file."""
        if self._file:
            note = {'pid': os.getpid(), 'ports': list(ports)[:500],       # what fits
                    'is_configured': is_configured, 'namespace': pid_namespace()}
            self._file.seek(0)
            self._file.write(json.dumps(note).encode())
            self._file.truncate()

    def release(self):
        if self._file:
            with contextlib.suppress(OSError), self._file as file:    # the lock goes with it
                file.truncate(0)
            self._file = None

    def holder(self, patience_s: float = 5.0) -> Running | None:
        """The Running process, read twice: between, one that has just locked the file would have
        written itself.  Raises FailoverError when the file stays locked and names none."""
        try:
            file = open(self.path, 'rb', buffering=0)
        except FileNotFoundError:
            return None
        with file:
            before = None
            for _ in polling(patience_s):
                if lock_file(file, is_shared=True):
                    return None
                file.seek(0)
                running = read_running(file.read(LOCKED_BYTE))
                if running and running == before:
                    return running
                before = running
        raise FailoverError(f'{self.path} is locked by another program: end that, or remove the '
                            'file.')


def read_running(data):
    """The Running process in a pid file's data (from 1.0.0 a number alone), or None: to kill(2),
    0 and -1 are many."""
    try:
        note = loads_object(re.sub(rb'\A([1-9][0-9]*)\s*\Z', rb'{"pid": \1}', data))
    except ValueError:
        return None
    pid, ports = note.get('pid', 0), as_list(note.get('ports'))
    if not (is_whole(pid) and 0 < pid < 10**9):
        return None
    return Running(pid, ports, bool(note.get('is_configured')), note.get('namespace'))


def refuse_elsewhere(running: Running | None) -> None:
    """Raises FailoverError for a process of another container: a signal to its number would reach
    another process here, and the access token another program at its ports."""
    if running and not running.is_here:
        raise FailoverError(f'{PROGRAM} runs in another container (pid {running.pid} there): run '
                            'this command in that.')


def find_running(config_path: str) -> Running | None:
    """The Running process; None too when it is only starting, or its file cannot be read."""
    with contextlib.suppress(FailoverError, OSError):
        return PidFile(config_path).holder(patience_s=1.0)
    return None


#: What Windows locks nobody else can read: so a byte after the text of the pid file.
LOCKED_BYTE = 4096


def lock_file(file, is_shared):
    """Locks an open file until it is closed; False when another process has it.  Those who only
    look share the lock, so that they do not keep one another out."""
    try:
        if fcntl:
            fcntl.flock(file, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        elif sys.platform == 'win32':
            import msvcrt
            file.seek(LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            file.seek(0)
    except OSError:
        return False
    return True


def harden_process() -> None:
    """Files private from the start, no core dumps, enough sockets."""
    os.umask(0o077)
    try:
        import resource
    except ImportError:               # Windows
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MAX_CONNECTIONS + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))


# ==============================================================================
# Doctor
# ==============================================================================
# What can be seen from outside of a configuration, of the proxy that runs with it, and of all
# that both need.  Findings are texts; who prints them masks the tokens in them.

def fetch_health(config_path: str, config: Config | None) -> dict | None:
    """/health of the proxy that runs with this file, at the ports of its pid file or `config`."""
    running = find_running(config_path)
    ports = [*(running.ports if running else ()),
             *(profile.port for profile in (config.profiles.values() if config else ()))]
    for port in dict.fromkeys(port for port in ports if is_whole(port) and 0 < port < 65536):
        health = fetch_json(port, '/health', access_fields(running, config, port))
        if health and health.get('program') == PROGRAM:
            return health
    return None


def access_fields(running: Running | None, config: Config | None, port: int) -> dict:
    """The access token as a field, for a port of the running proxy alone: others are anyone's."""
    is_known = running and running.is_here and port in running.ports
    token = config.access_token if config and is_known else None
    return {'x-api-key': token} if token else {}


def fetch_json(port: int, path: str, headers: dict, method: str = 'GET') -> dict | None:
    """The JSON object at a port of this machine; None when there is none."""
    with contextlib.closing(http.client.HTTPConnection(LISTEN_HOST, port, timeout=3)) as client:
        try:
            client.request(method, path, headers=headers)
            return loads_object(client.getresponse().read())
        except (OSError, ValueError, http.client.HTTPException):
            return None               # nothing there, or another program


def open_ports(health: dict | None) -> dict:
    """{profile: port} of a running proxy; {} where none runs."""
    return {p['name']: p['port'] for p in health['profiles'] if p['port']} if health else {}


def keys_by_ref(health: dict | None) -> dict:
    """{ref: what /health says of the key} of a running proxy; {} where none runs."""
    return {f'{key["provider"]}:{key["id"]}': key for key in health['keys']} if health else {}


class Finding(NamedTuple):
    topic: str
    text: str
    remedy: str = ''          # what to do; '' where all is well


def diagnose(config_path: str) -> Iterator[Finding]:
    """Yields Findings, the quick ones first.  Only test_key sends tokens, and nothing costs."""
    import platform
    import ssl
    store, problem = ConfigStore(config_path), None
    try:
        store.load()
    except ConfigError as error:
        problem = error
    config = store.current            # the defaults, where the file is wrong
    health = fetch_health(config_path, config)
    yield Finding('program', f'{PROGRAM} {VERSION} at {tilde(os.path.abspath(__file__))}, Python '
                             f'{platform.python_version()}, {ssl.OPENSSL_VERSION}, '
                             f'{platform.platform()}')
    yield from examine_configuration(store, problem)
    yield from examine_proxy(config_path, config, health)
    yield from examine_keys(config, health)
    yield from examine_environment()
    yield from examine_tools(config_path, config, health)
    yield examine_autostart(config_path)
    yield from examine_upstreams(config)
    yield from examine_log(log_path(config_path))


def examine_configuration(store, problem):
    config, path = store.current, tilde(store.path)
    if problem:
        yield Finding('configuration', str(problem), 'correct the file where it says so')
        return
    count = f'{count_of(len(config.keys), "key")}, {count_of(len(config.profiles), "profile")}'
    is_there = os.path.exists(store.path)
    yield Finding('configuration', f'{path}: {count}' if is_there else f'{path}: none yet')
    is_open = is_there and os.stat(store.path).st_mode & 0o077
    for notice in store.take_notices():
        yield Finding('configuration', notice, f'chmod 600 {path}' if is_open else '')
    for name in unknown_fields(config):
        yield Finding('configuration', f'the field {name} is not known',
                      'correct its spelling, or take it out')


def examine_proxy(config_path, config, health):
    if health is None:
        yield examine_silence(config_path)
        yield from (examine_port(p) for p in config.profiles.values() if p.port)
        return
    is_old = health['version'] != VERSION
    yield Finding('proxy', f'{health["version"]} runs, pid {health["pid"]}, for '
                           f'{format_duration(health["uptime_s"])}, started by '
                           f'{health["started_by"]}, status {health["status"]}',
                  f'{RUN} restart: it is another version' if is_old else '')
    for problem in health['problems']:
        yield Finding('proxy', problem, f'fix that; the proxy looks again every {RELOAD_S} s')
    for profile in health['profiles']:
        where = local_url(profile['port']) if profile['port'] else 'has no open port'
        yield Finding('port', f'profile {profile["name"]}: {where}',
                      '' if profile['port'] else 'give it another "port"')


def examine_silence(config_path):
    try:
        running = PidFile(config_path).holder()
        refuse_elsewhere(running)
    except FailoverError as error:
        return Finding('proxy', str(error), 'do what that says')
    if running:
        return Finding('proxy', f'process {running.pid} runs, but none of its ports answers',
                       f'{RUN} restart --now')
    return Finding('proxy', 'not running', f'{RUN} start -d')


def examine_port(profile):
    place = f'{profile.port} of profile {profile.name}'
    with socket.socket() as sock:
        if sock.connect_ex((LISTEN_HOST, profile.port)):
            return Finding('port', f'{place} is free')
    return Finding('port', f'{place} is taken by another program',
                   'end that program, or give the profile another "port"')


def examine_keys(config, health):
    """Each key as the running proxy has it; where none runs, whether its token can be read."""
    for key in config.keys.values():
        known, problem = keys_by_ref(health).get(key.ref), token_problem(key)
        state = (f'{state_words(known["state"])}, {count_of(known["answers"], "answer")}'
                 if known else 'idle')
        yield Finding('key', f'{key.ref} ({mask_token(key.token)}): {problem or state}',
                      'give the key a token that can be read' if problem else '')


def examine_environment():
    for name in filter(os.environ.get, CARRIED_VARIABLES):
        value = os.environ[name]
        is_missing = name.startswith('SSL') and not os.path.exists(value)
        shown = re.sub(r'//[^/@]*@', '//...@', value)         # a proxy's password
        yield Finding('environment', f'{name}={shown}',
                      'name a file that exists, or unset it' if is_missing else '')


def examine_tools(config_path, config, health):
    ours = own_values(config, open_ports(health))
    for tool, path, is_found, url, problem in ToolSetup(config_path).states():
        if problem:
            yield Finding('tool', f'{tool.name}: {tilde(path)} {problem}', 'correct the file')
        elif url:
            is_stale = url.startswith('http://localhost:') and url not in ours
            yield Finding('tool', f'{tool.name}: uses {url}',
                          f'no profile has this port: {RUN} setup' if is_stale else '')
        elif is_found:
            yield Finding('tool', f'{tool.name}: does not use the proxy ({RUN} setup)')


def examine_autostart(config_path):
    try:
        autostart = find_autostart(config_path)
    except FailoverError as error:
        return Finding('autostart', str(error))
    content = read_file(autostart.path)
    if content is None:
        return Finding('autostart', 'it does not start at login')
    text = f'{autostart.manager} starts it at login: {tilde(autostart.path)}'
    if start_commands(autostart, content) == start_commands(autostart, autostart.content):
        return Finding('autostart', text)
    return Finding('autostart', f'{text}, but another program or configuration',
                   f'{RUN} setup --autostart renews it')


def examine_upstreams(config):
    """Each server that keys are sent to, and what it says to them."""
    upstream, watcher = Upstream(), Watcher()
    watcher.start()
    keys, dead = [key for key in config.keys.values() if is_served(config, key)], set()
    near, far = socket.socketpair()   # a client that does not leave
    with near, far:
        def asked(ask, *arguments):
            with watcher.watching(Exchange(near)) as exchange:
                return ask(*arguments, upstream, exchange)
        for url in dict.fromkeys([server_of(config, key) for key in keys]
                                 or [config.anthropic_base_url]):
            finding = asked(examine_server, url)
            if finding.remedy and finding.topic == 'server':
                dead.add(url)
            yield finding
        for key in keys:
            if server_of(config, key) not in dead and not token_problem(key):
                yield key_finding(key, asked(test_key, config, key))
    upstream.close_idle()


def key_finding(key, tested):
    text = f'{key.ref} at {tested.url}: {tested.status or "no answer"}, {tested.message}'
    command = 'add-openai-key' if key.provider == OPENAI else 'add-key'
    return Finding('key', text, '' if tested.is_valid else
                   f'correct or replace it: {RUN} remove-key {key.id}, {RUN} {command}')


def examine_server(url, upstream, exchange):
    """Whether a server can be reached (name, TLS, HTTP), and what time it is there."""
    base = parse_base_url(url)
    head = request_head(f'HEAD {base.path or "/"} HTTP/1.1', [('host', base.host_field)])
    started = time.monotonic()
    try:
        response = upstream.open(UpstreamRequest(base, 'HEAD', head, b''), exchange, CONNECT_S)
    except (UpstreamUnreachable, UpstreamTimeout) as error:
        return Finding('server', f'{url}: {str(error) or "no answer in time"}',
                       'check the network, HTTPS_PROXY and SSL_CERT_FILE')
    response.close()
    ms = round((time.monotonic() - started) * 1000)
    off_s = clock_offset_s(response.headers.get('date'), time.time())
    text = f'{url}: reached, {response.status} in {ms} ms'
    if abs(off_s) > 300:              # certificates and reset times would be misread
        return Finding('clock', f"{text}; this machine's clock is {format_duration(abs(off_s))} "
                                f'{"ahead" if off_s > 0 else "behind"}', 'set the clock')
    return Finding('server', text)


def clock_offset_s(date, now):
    """By how much a clock is ahead of a Date field; 0 without one."""
    try:
        return now - email.utils.parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError, OverflowError):
        return 0


def examine_log(path):
    failures = last_records(path, 1000, 'warn')[-5:]
    yield Finding('log', f'{tilde(path)}: {len(failures)} of the last warnings and errors follow'
                  if failures else f'{tilde(path)}: no warnings')
    for record in failures:
        yield Finding('log', f'{local_time(record.get("time"))} {record.get("level")} '
                             f'{record.get("event")} {describe_record(record)[:300]}')


# ==============================================================================
# Demo
# ==============================================================================
# The real proxy between a pretend client and pretend upstreams, in one process: it shows a
# failover to who has no key yet.  Nothing leaves this machine.

class Asked(NamedTuple):
    key: str                  # the id in the demo's token, 'client' for any other
    method: str
    path: str
    body: dict


class Reply(NamedTuple):
    """What it answers: a body, or a stream's events as pieces of bytes."""
    status: int
    fields: list
    body: bytes = b''
    pieces: tuple = ()


class PretendUpstream(LocalServer):
    """Anthropic's API, and OpenAI's below /openai; `play(asked)` names the row of PLAYS."""

    def __init__(self, play=lambda asked: 'answer', pause_s: float = 0):
        self.play, self.pause_s = play, pause_s
        self.asked = 0                # requests so far: the more, the less is left of a limit
        super().__init__((LISTEN_HOST, 0), PretendHandler)
        self.url = f'http://{LISTEN_HOST}:{self.server_port}'
        threading.Thread(target=self.serve_forever, args=(0.02,), name='pretend',
                         daemon=True).start()

    def reply(self, asked):
        self.asked += 1
        return PLAYS[self.play(asked)](asked, self.asked)

    def handle_error(self, request, client_address):
        # The proxy drops the connection of a stream that broke: that is expected.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def close(self):
        self.shutdown()
        self.server_close()


class PretendHandler(http.server.BaseHTTPRequestHandler):
    server: Any               # a PretendUpstream
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True

    def do_POST(self):
        data = self.rfile.read(int(self.headers.get('content-length', 0)))
        token = self.headers.get('x-api-key') or self.headers.get('authorization', '')
        key = re.search(r'sk-(?:ant-\w+|proj)-(\w+)-', token)
        asked = Asked(key.group(1) if key else 'client', self.command, self.path,
                      loads_object(data) if data else {})
        reply = self.server.reply(asked)
        framing = (('transfer-encoding', 'chunked') if reply.pieces else
                   ('content-length', str(len(reply.body))))
        self.send_response_only(reply.status)
        for name, value in (*reply.fields, framing):
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(reply.body)
        for piece in (*reply.pieces, b'') if reply.pieces else ():
            self.wfile.write(b'%x\r\n%b\r\n' % (len(piece), piece))
            time.sleep(self.server.pause_s)

    do_GET = do_HEAD = do_DELETE = do_POST

    def log_message(self, format, *arguments):
        """Not to the terminal, where the demo is."""


def json_reply(value, fields):
    return Reply(200, [JSON_TYPE, *fields], dump_body(value))


def stream_reply(pieces, fields=()):
    return Reply(200, [('content-type', 'text/event-stream'), *fields], pieces=tuple(pieces))


def pretend_answer(asked, count):
    """A healthy upstream's answer, on every path that clients use."""
    fields = [('request-id', f'req_demo_{count:06d}')]
    if asked.path.startswith('/openai'):
        return pretend_openai(asked, fields)
    fields += pretend_limits(count)
    if asked.path.startswith(COUNT_TOKENS_PATH):
        return json_reply({'input_tokens': estimate_tokens(asked.body)}, fields)
    if not asked.path.startswith(MESSAGES_PATH):
        return json_reply({'data': list(map(model_info, DEMO_MODELS)), 'has_more': False,
                           'first_id': OPUS, 'last_id': HAIKU}, fields)
    message = pretend_message(asked, count)
    if asked.body.get('stream'):
        return stream_reply(map(event_bytes, events_from_message(message)), fields)
    return json_reply(message, fields)


def pretend_message(asked, count):
    model = asked.body.get('model')
    text = f'This is {model}, by way of the key {asked.key}. What is next?'
    usage = {'input_tokens': estimate_tokens(asked.body), 'output_tokens': len(text.split())}
    return {'id': f'msg_demo_{count:06d}', 'type': 'message', 'role': 'assistant',
            'content': [{'type': 'text', 'text': text}], 'model': model,
            'stop_reason': 'end_turn', 'stop_sequence': None, 'usage': usage}


def pretend_openai(asked, fields):
    if not asked.path.endswith('/chat/completions'):
        models = [{'id': 'gpt-5.4', 'object': 'model', 'created': 0, 'owned_by': 'openai'}]
        return json_reply({'object': 'list', 'data': models}, fields)
    model = asked.body.get('model')
    text = f'This is {model}, in the words of Claude. What is next?'
    asked_tokens, tokens = estimate_tokens(asked.body), len(text.split())
    answer = {'id': 'chatcmpl-demo', 'object': 'chat.completion', 'created': 0, 'model': model,
              'usage': {'prompt_tokens': asked_tokens, 'completion_tokens': tokens,
                        'total_tokens': asked_tokens + tokens}}
    choice = {'index': 0, 'finish_reason': 'stop', 'logprobs': None}
    said = {'role': 'assistant', 'content': text, 'refusal': None}
    if not asked.body.get('stream'):
        return json_reply({**answer, 'choices': [{**choice, 'message': said}]}, fields)
    last = {**answer, 'object': 'chat.completion.chunk', 'choices': []}
    first = {**last, 'usage': None, 'choices': [{**choice, 'delta': said}]}
    return stream_reply([*(b'data: %b\n\n' % dump_body(chunk) for chunk in (first, last)),
                         b'data: [DONE]\n\n'], fields)


def pretend_limits(count):
    """Rate-limit fields as Anthropic sends them; what is used grows with each request."""
    now, used = time.time(), min(0.97, 0.35 + count / 150)
    resets = {'5h': now + 2 * 3600, '7d': now + 3 * 86400}
    fields = [(f'anthropic-ratelimit-unified-{window}-{name}', value)
              for window, reset in resets.items()
              for name, value in (('status', 'allowed'), ('reset', str(int(reset))), (
                  'utilization', f'{used if window == "5h" else used / 2:.2f}'))]
    for name, limit in (('requests', 50), ('tokens', 80_000)):
        fields += [(f'anthropic-ratelimit-{name}-limit', str(limit)),
                   (f'anthropic-ratelimit-{name}-remaining', str(int(limit * (1 - used / 2)))),
                   (f'anthropic-ratelimit-{name}-reset', utc_text(now + 60))]
    return fields


def pretend_refusal(status, message, *retry_after):
    def play(asked, count):
        fields = [('retry-after', str(seconds)) for seconds in retry_after]
        fields += [JSON_TYPE, ('request-id', f'req_demo_{count:06d}')]
        return Reply(status, fields, error_json(error_type(status), message))
    return play


def pretend_broken(asked, count):
    """A stream that begins with status 200, and breaks before its first word."""
    begun = events_from_message(pretend_message(asked, count))[0]
    return stream_reply([event_bytes(begun), error_event('overloaded_error', 'Overloaded')])


PLAYS = {
    'answer': pretend_answer, 'broken': pretend_broken,
    'limited': pretend_refusal(429, 'You are out of tokens for this hour.', 3000),
    'limited briefly': pretend_refusal(429, 'Too many requests.', 2),
    'limited for a while': pretend_refusal(429, 'Too many requests.', 20),
    'overloaded': pretend_refusal(529, 'Overloaded')}
OPUS, SONNET, HAIKU = DEMO_MODELS = 'claude-opus-5-5', 'claude-sonnet-5-5', 'claude-haiku-5-5'


class Scene(NamedTuple):
    """Some requests, and how the keys answer them."""
    title: str
    model: str
    plays: dict               # key id -> (name in PLAYS, ...), one each time; then it answers
    is_streamed: bool = True
    requests: int = 1


SCENES = (
    Scene('Two keys, and all is well: the first one answers.', OPUS, {}, False),
    Scene('The key personal hits its limit: the next key answers, and personal cools.', OPUS,
          {'personal': ('limited',)}, requests=2),
    Scene('An answer breaks before its first word: another key answers, and no error is seen.',
          HAIKU, {'personal': ('broken',)}),
    Scene('Opus is overloaded, and its other key is still cooling: Sonnet answers.', OPUS,
          {'work': ('overloaded', 'overloaded')}),
    Scene('Both keys are rate-limited for two seconds: the request waits instead of failing.',
          SONNET, {'personal': ('limited briefly',), 'work': ('limited briefly',)}),
    Scene('Both are rate-limited for an hour: an OpenAI model answers, in the words of Claude.',
          SONNET, {'personal': ('limited',), 'work': ('limited',)}),
)
#: What `--keep` goes on with, at random.
EVERYDAY = (
    *(Scene('', model, {}, is_streamed) for model in DEMO_MODELS for is_streamed in (True, False)),
    Scene('', HAIKU, {'personal': ('broken',)}),
    *(Scene('', model, dict.fromkeys(keys, ('limited for a while',)))
      for model in (OPUS, SONNET) for keys in (('personal',), ('personal', 'work'))),
)
#: The words of an answer, streamed or not.
TEXT_MEMBER = re.compile(rb'"text": ?("(?:[^"\\]|\\.)*")')


class LoopbackOnly(Upstream):
    """Refuses to call any host but this machine, whatever the dashboard sets."""

    def _connect(self, base):
        if not is_loopback(base.host):
            raise UpstreamUnreachable(f'{base.host}: the demo calls nobody', False)
        return super()._connect(base)


def demo_document(url, port):
    """The demo's configuration: two Claude keys and one of OpenAI, at a pretend upstream."""
    def keys(kind, *ids):
        return {id: {'token': f'sk-{kind}-{id}-{"0" * 40}', 'label': id} for id in ids}
    return {
        'anthropicBaseUrl': url, 'openaiBaseUrl': f'{url}/openai/v1', 'queueWaitMs': 5000,
        'fallbackPatienceMs': 0, 'profiles': {'default': {'port': port}},
        'openaiModelFallback': True,
        'keys': keys('ant-api03', 'personal', 'work'), 'openaiKeys': keys('proj', 'openai')}


class Demo:
    """The proxy with its pretend upstream, in a folder of its own."""

    def __init__(self, folder: str, port: int, pause_s: float):
        self._plays = {}              # key id -> iterator of what it does yet
        self.upstream = PretendUpstream(
            lambda asked: next(self._plays.get(asked.key, iter(())), 'answer'), pause_s / 30)
        path = os.path.join(folder, 'config.json')
        write_atomically(path, json.dumps(demo_document(self.upstream.url, port)).encode())
        self.app = App(path, LoopbackOnly())
        self.app.start()
        self.port = self.app.ports()['default']
        self._thread = threading.Thread(target=self.app.run, name='demo', daemon=True)
        self._thread.start()
        self.is_over = threading.Event()

    def close(self):
        self.is_over.set()
        self.app.stop()
        self._thread.join(DRAIN_S)
        self.upstream.close()

    def play(self, scene: Scene):
        """Sends the scene's requests; yields (the journal's record, ttfb in s, text) of each."""
        self._plays = {key: iter(plays) for key, plays in scene.plays.items()}
        for _ in range(scene.requests):
            with self.app.bus.subscription() as news:
                first_byte_s, text = self._ask(scene)
                events = iter(functools.partial(news.next, CONNECT_S), None)
                record = next(json.loads(data) for name, data in events if name == 'request')
                yield record, first_byte_s, text

    def _ask(self, scene):
        """A client's request over HTTP; (seconds to the answer's first byte, its text)."""
        body = dump_body({'model': scene.model, 'max_tokens': 100, 'stream': scene.is_streamed,
                          'messages': [{'role': 'user', 'content': 'What is this?'}]})
        started = time.monotonic()
        with contextlib.closing(http.client.HTTPConnection(LISTEN_HOST, self.port, 60)) as client:
            client.request('POST', MESSAGES_PATH, body, {'content-type': 'application/json'})
            response = client.getresponse()
            data = response.read(1)
            first_byte_s = time.monotonic() - started
            texts = TEXT_MEMBER.findall(data + response.read())
            return first_byte_s, ''.join(map(json.loads, texts))


# ==============================================================================
# Command line
# ==============================================================================
# Printing happens only here.  A command returns its exit status: None or 0, 1 failed, 2 misused.

PAINTS = {'bold': 1, 'dim': 2, 'good': 32, 'warn': 33, 'bad': 31}


def paint(kind, text, environ=os.environ):
    """A text in one of PAINTS, on a terminal that wants colours."""
    is_wanted = (sys.stdout.isatty() and not environ.get('NO_COLOR')
                 and environ.get('TERM') != 'dumb')
    return f'\x1b[{PAINTS[kind]}m{text}\x1b[0m' if is_wanted else str(text)


def say(text=''):
    print(text, flush=True)


def complain(text: object) -> None:
    print(f'{PROGRAM}: {printable(text)}', file=sys.stderr, flush=True)


complain_once = functools.cache(complain)     # one command may read the file twice


def load_config(config_path):
    """The Config in a file.  Raises ConfigError."""
    store = ConfigStore(config_path)
    try:
        store.load()
    finally:
        for notice in store.take_notices():
            complain_once(notice)
    return store.current


def read_config(config_path):
    """(Config, None), or (None, the ConfigError that says why it cannot be read)."""
    try:
        return load_config(config_path), None
    except ConfigError as error:
        return None, error


def say_json(value):
    say(json.dumps(value, indent=2))


def say_table(rows, indent='  '):
    """Rows of texts and numbers in columns."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        say((indent + '  '.join(cell.ljust(w) for cell, w in zip(row, widths))).rstrip())


def cmd_demo(options):
    import signal
    import tempfile
    signal.signal(signal.SIGTERM, signal.default_int_handler)     # leaves nothing behind either
    with tempfile.TemporaryDirectory(prefix=f'{PROGRAM}-demo-') as folder:
        forget_user(folder)
        try:
            demo = Demo(folder, options.port, 0 if options.fast else 1)
        except PortTaken as error:
            raise PortTaken(f'{error} Choose another with --port, or leave it out.') from error
        with contextlib.closing(demo):
            run_beside(play_demo, demo, options)


def run_beside(function, *arguments):
    """Calls a function in a thread, and raises here what it raises.  Ctrl-C then meets a thread
    that only waits: one at work may be in a destructor, which swallows it, or hold a lock."""
    errors = []

    def run():
        try:
            function(*arguments)
        except BaseException as error:
            errors.append(error)
    thread = threading.Thread(target=run, name='beside')
    thread.start()
    while thread.is_alive():
        thread.join(POLL_S)           # a signal wakes only the thread that it reaches
    for error in errors:
        raise error


def forget_user(folder):
    """Keeps the user's tools, tokens and managers out of the demo dashboard's reach."""
    kept = {name: value for name, value in os.environ.items()
            if name in ('LANG', 'LC_ALL', 'TERM', 'NO_COLOR', 'COLUMNS', 'TZ')}
    os.environ.clear()
    os.environ.update(kept, HOME=folder, PATH=folder)


def play_demo(demo, options):
    say_wrapped(f'{paint("bold", PROGRAM)} at {local_url(demo.port)}, with pretend upstreams: '
                'nothing leaves this machine.')
    if os.path.exists(DASHBOARD_PATH):
        say(f'Dashboard  {local_url(demo.port)}/dashboard')
    say_wrapped('Each line: the model asked, who was tried, the time to the first byte, the '
                'answer.')
    for number, scene in enumerate(SCENES, 1):
        say()
        say_wrapped(f'{number}. {scene.title}')
        say_played(demo, scene)
        demo.is_over.wait(0 if options.fast else 1.2)
    metrics = demo.app.health()['metrics']
    rescued = sum(minute['rescued'] for minute in demo.app.metrics.history())
    say()
    say_wrapped(paint('bold', f'{metrics["answered"]} of {metrics["requests"]} requests were '
                              f'answered; without the proxy {rescued} would have failed.'))
    say_wrapped(f'{describe_rescues(metrics)}, {metrics["by_provider"].get(OPENAI, 0)} answered '
                'by OpenAI.')
    say(f'\nNow with your own keys:\n  {RUN} add-key\n  {RUN} start')
    while options.keep and not demo.is_over.wait(random.uniform(0.5, 2.5)):
        say_played(demo, random.choice(EVERYDAY))


def terminal_width():
    import shutil
    return max(40, shutil.get_terminal_size((100, 24)).columns - 1)


def say_wrapped(text):
    import textwrap
    say(textwrap.fill(text, terminal_width()))


def say_played(demo, scene):
    """A line for each request: the model asked, who tried, how long it took, what was said."""
    for record, first_byte_s, text in demo.play(scene):
        chain = ' -> '.join(describe_attempts(record))
        wait = f'held {record["queued_ms"] / 1000:.1f} s, ' if record.get('queued_ms') else ''
        begun = f'   {scene.model}: {chain}, {wait}{first_byte_s * 1000:.0f} ms'
        if terminal_width() - len(begun) < 20:    # the answer gets a separate line
            say_wrapped(begun)
            begun = '     '
        quote, room = f'  "{text}"', terminal_width() - len(begun)
        shown = quote if len(quote) <= room else quote[:room - 4] + '..."'
        say(begun + paint('dim', shown))


def describe_attempts(record):
    """Yields 'personal 429', 'claude-sonnet-5-5 on work 200', ...: models where they change."""
    model = record['model']
    for attempt in record['attempts']:
        on_model = f'{attempt["model"]} on ' if attempt['model'] != model else ''
        model = attempt['model']
        yield f'{on_model}{attempt["key"]} {attempt["status"] or attempt["result"]}'


def describe_rescues(metrics):
    return (f'{count_of(metrics["rotations"], "rotation")}, '
            f'{count_of(metrics["fallbacks"], "fallback")}, {metrics["queued"]} queued')


def cmd_start(options):
    if options.daemon:
        return start_in_background(options)
    harden_process()
    app = App(options.config)
    if not app.pid_file.acquire():
        running = app.pid_file.holder()
        raise already_running(running and running.pid)
    tidy_up(options.config)
    try:
        app.start()
    except PortTaken as error:
        running = fetch_health(options.config, app.store.current)
        if running:
            raise already_running(running['pid']) from error
        raise PortTaken(f'{error} Stop the program that uses it, or give the profile another '
                        f'"port" in {options.config}.') from error
    try:
        stop_on_signals(app)
        with contextlib.suppress(OSError):        # it serves, whether anyone reads this or not
            say_started(app)
        app.run()
    finally:
        # Without the interpreter's own end: that takes OpenSSL from threads still inside it.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(1 if sys.exc_info()[0] else 0)


def tidy_up(config_path):
    """Removes what saves that were cut short left (it may hold keys), and 1.0.0's note of where
    it runs.  Only for the holder of the pid file: another proxy may be writing."""
    note = os.path.join(os.path.dirname(config_path), 'running.json')
    for path in (config_path, note, state_path(config_path), ToolSetup(config_path).record_path):
        with contextlib.suppress(FailoverError):      # the folder of a link that leads nowhere
            remove_leftovers(path)
    with contextlib.suppress(OSError):
        os.unlink(note)


def already_running(pid):
    who = f' (pid {pid})' if pid else ''
    return FailoverError(f'{PROGRAM} is running already{who}. See: {RUN} status')


def start_in_background(options):
    """Starts the proxy in another process, and waits until its ports answer."""
    import subprocess
    running = PidFile(options.config).holder()
    if running:
        raise already_running(running.pid)
    output = f'{output_path(options.config)}.{os.getpid()}'       # two may try at once
    make_private_folder(os.path.dirname(output))
    with open(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 'wb') as file:
        process = subprocess.Popen(
            start_command(sys.executable, options.config),
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, cwd='/',
            env={name: value for name, value in os.environ.items() if name != STARTED_BY})
    health = await_health(options, process)
    with open(output, encoding='utf-8', errors='replace') as file:
        complaints = [line.rstrip()[len(PROGRAM) + 2:] for line in file
                      if line.startswith(f'{PROGRAM}: ')]
    os.replace(output, output_path(options.config))
    if health is None:
        process.kill()
        raise FailoverError(' '.join(complaints) or
                            f'It did not start; {output_path(options.config)} may say why.')
    for complaint in complaints:
        complain(complaint)
    say(f'{PROGRAM} {health["version"]} runs in the background, pid {process.pid}; '
        f'stop it with: {RUN} stop')
    say_ports(health)


def await_health(options, process):
    """/health of a process that starts; None when it ends, or does not answer in time."""
    config, _ = read_config(options.config)       # a broken one is the process's to report
    for _ in polling(30):
        health = fetch_health(options.config, config)
        if health and health['pid'] == process.pid:
            return health
        if process.poll() is not None:
            break
    return None


def cmd_stop(options):
    pid = end_process(options, options.now)
    say('not running' if pid is None else f'Stopped (pid {pid}).')


def end_process(options, is_now):
    """Ends the running proxy, `is_now` at once, and waits for that; its pid, None for none."""
    import signal
    pid_file = PidFile(options.config)
    running = pid_file.holder()
    if running is None:
        return None
    refuse_elsewhere(running)
    pid = running.pid
    for turn, _ in enumerate(polling(DRAIN_S + 5)):
        if is_now or not turn:        # the second signal ends it at once
            with contextlib.suppress(ProcessLookupError):     # it ended just now
                os.kill(pid, signal.SIGTERM)
        if turn == 25 and not is_now:             # after a second
            complain(f'waiting up to {DRAIN_S} s for running answers; `stop --now` cuts them.')
        running = pid_file.holder()
        if not running or running.pid != pid:
            return pid
    raise FailoverError(f'Process {pid} did not end; to end it by force: kill -9 {pid}')


def cmd_restart(options):
    running = PidFile(options.config).holder()
    if running and running.is_here and running.pid == 1:
        raise FailoverError('It is the first process of this container, which ends with it: '
                            'restart the container.')
    started_by = who_started(options)
    autostart = None if started_by in (None, 'hand') else find_autostart(options.config)
    end_process(options, options.now)
    if autostart is None or autostart.manager != started_by:
        return start_in_background(options)
    problem = run_commands(autostart.restart)
    if problem:
        raise FailoverError(f'{started_by} did not start it again: {problem}')
    say(f'{started_by} has started it again.')


def who_started(options):
    """'launchd', 'systemd' or 'hand', of the running proxy; None where none answers."""
    health = find_running(options.config) and fetch_health(
        options.config, read_config(options.config)[0])
    return health and health['started_by']


def cmd_setup(options):
    if sum((options.autostart, options.remove_autostart, options.undo)) > 1:
        raise UsageError('Say only one of --autostart, --remove-autostart and --undo.')
    if options.autostart or options.remove_autostart:
        run = run_by_manager if options.autostart else run_by_no_manager
        return run(options, find_autostart(options.config))
    if not options.undo:
        return set_up_tools(options)
    config, _ = read_config(options.config)       # a broken one must not keep undo from working
    setup, health = ToolSetup(options.config), fetch_health(options.config, config)
    edit = functools.partial(setup.undo, ours=own_values(config, open_ports(health)))
    return edit_tools(options, TOOLS, config, edit)


def set_up_tools(options):
    config = load_config(options.config)
    url, setup = profile_url(options, config), ToolSetup(options.config)
    found = [tool for tool in TOOLS if setup.is_found(tool)]
    edit = functools.partial(setup.configure, url=url, access_token=config.access_token)
    failed = edit_tools(options, found, config, edit)
    say(f'Other tools (Aider, the SDKs): set {BASE_URL_VARIABLE}={url}, with any API key.')
    if setup.has_cursor():
        say(CURSOR_NOTE)
    if config.access_token:
        say(f'The access token is not written for shells: set {TOKEN_VARIABLE} to it yourself.')
    if not options.dry_run:
        say(f'Undo with: {RUN} setup --undo')
        if not fetch_health(options.config, config):
            say(f'Start the proxy with: {RUN} start -d')
    return failed


def edit_tools(options, found, config, edit):
    """Edits the files of the tools that --only names, else of those `found`, less those that
    --skip names, and says what became of each; 1 when one was left alone."""
    wanted = [tool for tool in TOOLS if tool.id in options.only] or found
    tools = [tool for tool in wanted if tool.id not in options.skip]
    rows, failed = [], 0
    for tool in tools:
        try:
            change = edit(tool, is_dry=options.dry_run)
        except ToolError as error:
            failed = 1
            complain(error)
            continue
        if options.dry_run and change.is_change:
            say_diff(change, config)
        elif change.before is not None or change.is_change:
            rows.append((tool.name, tilde(change.path), change.text))
    if rows:
        say_table(rows, indent='')
    if not tools:
        say('No tool with a file of its own was found here; --only names one all the same.')
    return failed


def say_diff(change, config):
    """What would change in a file, without a secret."""
    import difflib
    before, after = ((text or '').splitlines() for text in (change.before, change.after))
    name = tilde(change.path)
    for line in difflib.unified_diff(before, after, name, name, n=1, lineterm=''):
        if config and config.access_token:
            line = line.replace(config.access_token, mask_token(config.access_token))
        say(printable(redact(line)))


def profile_url(options, config):
    """Where the profile that --profile names listens.  Raises UsageError."""
    name = options.profile or ('default' if 'default' in config.profiles else
                               next(iter(config.profiles)))
    refuse_unknown_profile(config, name)
    port = config.profiles[name].port or open_ports(fetch_health(options.config, config)).get(name)
    if not port:
        raise UsageError(f'Profile {name} has port 0, so its port is known only while it runs: '
                         f'start the proxy, or give it a "port" in {options.config}.')
    return local_url(port)


def run_by_manager(options, autostart):
    """Has the manager start the proxy at login and now, in place of the one that runs."""
    has_changed, problem = start_at_login(autostart)
    if not has_changed and who_started(options) == autostart.manager:
        return say(f'It starts at login already, by {autostart.manager}: nothing was changed.')
    say(f'{"Wrote" if has_changed else "Found"} {autostart.path}.')
    if problem:                       # a container, or a login that has no session
        import shlex
        commands = ' && '.join(map(shlex.join, autostart.enable + autostart.start))
        return complain(f'{autostart.manager} cannot be reached here ({problem}); where it runs, '
                        f'do: {commands}')
    pid = end_process(options, is_now=False)
    if pid:
        say(f'The proxy that ran so far (pid {pid}) was stopped.')
    run_commands(autostart.stop)      # only then does launchd read a changed file
    problem = run_commands(autostart.start)
    if problem:
        raise FailoverError(f'{autostart.manager} did not start it: {problem}')
    say(f'{autostart.manager} runs the proxy now, and at each login. {autostart.hint}'.rstrip())


def run_by_no_manager(options, autostart):
    if not os.path.exists(autostart.path):
        return say('It does not start at login: nothing was changed.')
    problem = run_commands(autostart.stop)
    start_at_no_login(autostart)
    say(f'Removed {autostart.path}; the proxy does not start at login any more.')
    if problem:
        complain(f'{autostart.manager} cannot be reached here ({problem}): the proxy may run '
                 f'until you log out. See: {RUN} status')


def stop_on_signals(app):
    """The first SIGTERM or SIGINT drains, the second ends at once.  A signal wakes only the thread
    that it reaches: so its number goes over a socket to one that waits for it."""
    import signal
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)

    def watch():
        with writer:
            while reader.recv(1):
                if app.stopping:
                    os._exit(1)
                running = len(app.watcher)
                app.stop()
                if running:
                    complain(f'waiting up to {DRAIN_S} s for {count_of(running, "answer")}; '
                             'once more ends at once.')
    threading.Thread(target=watch, name='signals', daemon=True).start()


def say_started(app):
    config = app.store.current
    say(f'{paint("bold", PROGRAM)} {VERSION}; Ctrl-C stops it')
    say_ports(app.health())
    count = collections.Counter(key.provider for key in config.keys.values())
    openai = f', {count[OPENAI]} OpenAI' if count[OPENAI] else ''
    is_off = openai and not config.openai_model_fallback
    say(f'Keys       {count[ANTHROPIC]} Anthropic{openai}'
        + (' (openaiModelFallback is off)' if is_off else ''))
    missing = '' if os.path.exists(DASHBOARD_PATH) else f' (needs dashboard.html beside {RUN[8:]})'
    say(f'Dashboard  {local_url(next(iter(app.ports().values())))}/dashboard{missing}')
    say(f'Log        {app.log.path}')
    unknown = (f'the configuration has a field {printable(name)}, which is not known here.'
               for name in unknown_fields(config))
    for warning in (*app.store.take_notices(), *unknown, *key_warnings(config)):
        complain(warning)
    if not any(is_served(config, key) for key in config.keys.values()):
        say(paint('warn', 'There is no key yet: requests go out with '
                          "the client's own credential."))
        say(f'Add one with: {RUN} add-key')


def key_warnings(config):
    for key in config.keys.values():
        problem = token_problem(key)
        if problem:
            yield f'key {key.ref} cannot be used: {problem}.'


def save(options, edit) -> Any:
    """Applies an edit to the configuration file; what the edit gave.  Raises ConfigError where the
    file is gone that a running proxy has in force: a new one would hold the edit alone."""
    running = None if os.path.exists(options.config) else find_running(options.config)
    if running and running.is_configured:
        raise ConfigError(f'{options.config} is gone, but the running proxy (pid {running.pid}) '
                          'has it in force: any change in its dashboard writes it anew. To begin '
                          f'with an empty one, stop the proxy first: {RUN} stop')
    store = ConfigStore(options.config)
    outcome = store.update(edit)
    for notice in store.take_notices():
        complain_once(notice)
    return outcome


def cmd_add_key(options):
    token = read_new_token(options)
    label = options.label_option or ' '.join(options.label)
    label = label.encode('utf-8', 'replace').decode()     # an argument may be no UTF-8

    def edit(before):
        config, key = add_key(before, options.provider, token, label, utc_text(time.time()),
                              options.base_url)
        return config, key, before
    config, key, before = save(options, edit)
    say(f'Added key {paint("bold", key.id)} ({mask_token(key.token)}), '
        f'{describe_places(config, key)}.')
    if config.openai_model_fallback and not before.openai_model_fallback:
        say('openaiModelFallback is on now: OpenAI answers where Claude cannot.')
    if key.provider == OPENAI and key.base_url:
        say(f'Claude names become the names of its models by "modelMapping": {{"*": "..."}} at '
            f'openaiKeys.{key.id} of {options.config}, or by openaiModelMapping for all.')
    problem = token_problem(key)
    if problem:
        complain(f'it cannot be used yet: {problem}.')
    if fetch_health(options.config, config):
        say(f'The running proxy uses it within {RELOAD_S} s.')
    elif len(config.keys) == 1:
        say(f'Start the proxy with: {RUN} start')


def describe_places(config, key):
    """'first in profile default, number 3 in profile work', or behind which keys it stands."""
    places = {p.name: p.order.index(key.ref) + 1 for p in config.profiles.values()}
    return ', '.join(f'{"first" if place == 1 else f"number {place}"} in profile {printable(name)}'
                     for name, place in places.items())


def warn_of_history(remedy):
    complain(f'a token on the command line stays in the shell\'s history; {remedy}.')


def read_new_token(options):
    """The token from the command line, standard input (`-`) or a prompt without echo."""
    if options.token == '-':
        return sys.stdin.readline()
    if options.token:
        if not is_reference(options.token) and len(options.token) > 12:
            warn_of_history(f'without it, {options.command} asks for it')
        return options.token
    if not sys.stdin.isatty():
        raise UsageError('There is no terminal to ask on: give the token, or - to read it from '
                         'standard input.')
    import getpass
    try:
        return getpass.getpass(f'{options.token_words} (not shown): ')
    except EOFError as error:
        raise UsageError('No token came: nothing was added.') from error


def cmd_remove_key(options):
    save(options, lambda config: remove_key(config, options.id))
    say(f'Removed key {printable(options.id)}.')


def cmd_list_keys(options):
    config = load_config(options.config)
    health = fetch_health(options.config, config)
    known, unknown = keys_by_ref(health), 'not loaded yet' if health else 'not running'
    keys = [{'id': key.id, 'label': printable(key.label)[:40], 'provider': key.provider,
             'token': mask_token(key.token), 'server': key.base_url or '-',
             'state': known[key.ref]['state'] if key.ref in known else unknown,
             'problem': token_problem(key)}
            for key in config.keys.values()]
    if options.json:
        orders = {profile.name: profile.order for profile in config.profiles.values()}
        return say_json({'keys': keys, 'profiles': orders})
    if not keys:
        return say(f'No keys. Add one with: {RUN} add-key')
    columns = ('id', 'label', 'provider', 'token', 'server')
    say_table([[*map(str.upper, columns), 'STATE'],
               *([*(key[column] for column in columns), state_words(key['state'])]
                 for key in keys)], indent='')
    for warning in key_warnings(config):
        complain(warning)
    for profile in config.profiles.values():
        say(f'Profile {printable(profile.name)} (port {profile.port}): '
            + ' -> '.join(profile.order))


def running_health(options):
    """/health of the running proxy, though its file may be broken.  Raises FailoverError."""
    config, problem = read_config(options.config)
    health = fetch_health(options.config, config)
    if health is None:
        refuse_elsewhere(find_running(options.config))
        raise problem or FailoverError(f'not running. Start it with: {RUN} start')
    return health


def cmd_config(options):
    if options.path:
        return say(options.config)
    if options.action:
        return set_setting(options) if options.action == 'set' else get_setting(options)
    port = next(iter(open_ports(running_health(options)).values()), 0)    # 0: it has just ended
    url, config = f'{local_url(port)}/dashboard', read_config(options.config)[0]
    if config and config.access_token:            # a code that is good once lets the browser in
        fields = access_fields(find_running(options.config), config, port)
        answer = fetch_json(port, '/api/login-code', fields, 'POST') or {}
        url += f'?code={answer.get("code")}'
    say(url if open_browser(url) else f'Open this address in a browser: {url}')


def get_setting(options):
    config = load_config(options.config)
    if options.field is None:
        return say_json(setting_values(config))
    if options.field not in setting_values(config):
        change_settings(config, {options.field: None})        # raises, naming those that exist
    value = getattr(config, attribute_name(options.field))
    say(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def set_setting(options):
    """A value is JSON where it can be read as such, and a text otherwise."""
    if options.value is None:
        raise UsageError(f'Say what to set: {RUN} config set FIELD VALUE (null: the default).')
    text = sys.stdin.readline().strip() if options.value == '-' else options.value
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    save(options, lambda config: change_settings(config, {options.field: value}))
    say(f'{options.field} is {"set" if value is not None else "the default again"}.')
    if options.field == 'accessToken' and value:
        if options.value != '-':
            warn_of_history('with - in its place, config set reads it from standard input')
        say(f'Have Claude Code present it: {RUN} setup')


def open_browser(url):
    """Opens an address where a browser can have a window; whether it did."""
    import webbrowser
    if sys.platform.startswith('linux'):
        if 'microsoft' in os.uname().release.lower():         # WSL: Windows has the browser
            import subprocess
            with contextlib.suppress(OSError):
                subprocess.call(['explorer.exe', url], stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL)
                return True
        if not (os.environ.get('DISPLAY') or os.environ.get('WAYLAND_DISPLAY')):
            return False
    try:
        return webbrowser.open(url)
    except webbrowser.Error:
        return False


def cmd_health(options):
    health = running_health(options)
    say_json(health)
    return 0 if health['status'] in ('ok', 'no_keys') else 1


def cmd_status(options):
    health = running_health(options)
    if options.conversations:
        return say_conversations(options, next(iter(open_ports(health).values()), 0))
    if options.json:
        return say_json(health)
    metrics = health['metrics']
    say(f'{paint("bold", PROGRAM)} {health["version"]} is {paint("good", "running")}, '
        f'pid {health["pid"]}, for {format_duration(health["uptime_s"])}; '
        f'{describe_start(options, health)}')
    for problem in health['problems']:
        say(paint('bad', f'  {printable(problem)}'))
    say_ports(health)
    say_keys(health)
    say(f'Requests   {metrics["requests"]} ({metrics["answered"]} answered, '
        f'{metrics["refused"]} refused, {metrics["failed"]} failed, '
        f'{metrics["client_gone"]} left, '
        f'{health["active"]} running, {health["waiting"]} waiting)')
    say(f'Saved by   {describe_rescues(metrics)}')


def describe_start(options, health):
    """'started by systemd, as at each login'."""
    by = health['started_by']
    try:
        at_login = os.path.exists(find_autostart(options.config).path)
    except FailoverError:             # no manager is known for this system
        at_login = False
    if by != 'hand':
        return f'started by {by}' + (', as at each login' if at_login else '')
    return 'started by hand; ' + ('it starts' if at_login else 'it does not start') + ' at login'


def say_conversations(options, port):
    fields = access_fields(find_running(options.config), read_config(options.config)[0], port)
    answer = fetch_json(port, '/api/conversations', fields) or {}
    views = as_list(answer.get('conversations'))
    if options.json:
        return say_json(views)
    if not views:
        return say('No conversation has a living cache.')
    heads = 'CONVERSATION,CLIENT,MODEL,KEY,SINCE,TURNS,MOVES,READ,WRITTEN,CACHE LIVES'
    say_table([heads.split(','), *(
        (view['conversation'], view['client'],
         ' -> '.join(dict.fromkeys(map(str, (view['model'], view['upstream_model'])))),
         view['key'], local_moment(view['since']), view['turns'],
         f'{view["moves"]} ({view["why"]})' if view['moves'] else 0, view['tokens_read'],
         view['tokens_written'], format_duration(view['cache_ms'] / 1000))
        for view in views)], indent='')


def say_ports(health):
    say_table([[printable(profile['name']), local_url(profile['port'])
                if profile['port'] else 'not open', profile.get('strategy', '')]
               for profile in health['profiles']])


def local_moment(text):
    """'04:55', 'Thu 09:00' or '13 Dec 09:00', by the local clock."""
    moment = datetime.fromisoformat(text.replace('Z', '+00:00')).astimezone()
    days = abs((moment.date() - datetime.now().date()).days)
    return moment.strftime('%H:%M' if not days else '%a %H:%M' if days < 7 else '%d %b %H:%M')


def describe_window(window):
    """'7d 80 %, resets Thu 09:00, at this pace until Wed 03:00'."""
    text = f'{window["name"]} {100 * window["used"]:.0f} %'
    if window['resets_at']:
        text += f', resets {local_moment(window["resets_at"])}'
    if window['spent_at']:
        return f'{text}, at this pace until {local_moment(window["spent_at"])}'
    pace = window['pace']
    return text + (f', at this pace {100 * pace:.0f} % by then' if pace else '')


def say_limits(keys):
    """What is used of each plan's windows, and which keys share their limits."""
    for place, key in enumerate(keys):
        for window in key['windows']:
            if (window.get('length_s') or 0) > 60:
                say(printable(f'  {key["id"]}: {describe_window(window)}'))
        shared = [other['id'] for other in keys[:place]
                  if other['ref'] in key.get('siblings', ())]
        if shared:
            say(f'  {key["id"]} adds no capacity a minute: it is of the organization of '
                f'{shared[0]}')


def say_keys(health):
    if not health['keys']:
        say(f'Keys       none; add one with: {RUN} add-key')
        return
    say('Keys')
    say_table([[key['id'], key['provider'], key['token'], state_words(key['state']),
                count_of(key['answers'], 'answer')] for key in health['keys']])
    for key in health['keys']:
        if key['problem'] and key['state'] != 'unused':
            say(paint('bad', f'  {key["id"]} cannot be used: {printable(key["problem"])}'))
    say_limits(health['keys'])
    for cooling in health['cooldowns']:
        model = f' with {printable(cooling["model"])}' if cooling['model'] else ''
        left = format_duration(cooling['remaining_ms'] / 1000)
        why = f'{cooling["status"] or ""} {cooling["words"]}'.strip()
        text = f'  {cooling.get("server") or cooling["key"]}{model} cools for {left}: {why}'
        until, asked_at = map(local_moment, (cooling['until'],
                                             cooling.get('asked_at', cooling['until'])))
        text += f', resets {until}; tried again at {asked_at}' if until != asked_at else ''
        if cooling['message']:
            text += f', "{printable(cooling["message"])[:100]}"'
        say(paint('bad' if cooling['needs_attention'] else 'warn', text))


def cmd_doctor(options):
    status = 0
    for finding in diagnose(options.config):
        mark = paint('bad', 'WRONG') if finding.remedy else paint('good', 'ok   ')
        say(f'{mark}  {finding.topic:<13}  {printable(redact(finding.text))}')
        if finding.remedy:
            status = 1
            say(f'{"":22}-> {printable(redact(finding.remedy))}')
    return status


def cmd_completion(options):
    """What completes a command's name; files are left to the shell."""
    names = ' '.join(command.name for command in COMMANDS)
    for name in (PROGRAM, SCRIPT_NAME):
        say(COMPLETIONS[options.shell].format(name=name, commands=names))


#: zsh understands bash's with bashcompinit.
COMPLETIONS = {
    'bash': "complete -o default -W '{commands}' {name}",
    'zsh': "autoload -Uz bashcompinit && bashcompinit && "
           "complete -o default -W '{commands}' {name}",
    'fish': "complete -c {name} -f -n __fish_use_subcommand -a '{commands}'"}


def cmd_logs(options):
    path = log_path(options.config)
    lines = follow_lines(path)
    so_far = itertools.takewhile(lambda line: line is not None, lines)
    last = collections.deque(so_far, maxlen=max(0, options.lines))
    if not last:
        complain(f'there is no log line yet in {path}')
    for line in itertools.chain(last, lines if options.follow else ()):
        if line is None:
            time.sleep(0.25)
        else:
            say_log_line(line, options.json)


def follow_lines(path):
    """Yields the lines of a log, those of its rotated file first; None where it ends for now.
    After a rotation goes on in the new file, once the old one's last line is read."""
    with contextlib.suppress(OSError), open(path + '.1', 'rb') as file:
        yield from file.read().splitlines()
    while True:
        try:
            file = open(path, 'rb')
        except OSError:               # none is there yet
            yield None
            continue
        with file:
            is_last, rest = False, b''
            while not is_last:
                is_last = not is_same_file(file, path)  # asked before the last read, not after
                *lines, rest = (rest + file.read()).split(b'\n')
                yield from lines
                if not is_last:
                    yield None


def is_same_file(file, path):
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:         # between a rotation and the next line
        return False


def say_log_line(line, as_json):
    """A log line as JSON, or as: time, level, event, then its fields."""
    text = line.decode('utf-8', 'replace')
    record = object_or_none(text)
    if as_json or record is None:
        return say(printable(text))
    level, event = printable(record.get('level', '')), printable(record.get('event', ''))
    moment = paint('dim', local_time(record.get('time', '')))
    kind = {'error': 'bad', 'warn': 'warn', 'debug': 'dim'}.get(level)
    shown = paint(kind, f'{level:5}') if kind else f'{level:5}'
    say(f'{moment} {shown} {event} {describe_record(record)}')


class Command(NamedTuple):
    name: str
    help: str
    run: Callable
    arguments: tuple = ()     # (argument(...), ...)
    defaults: dict = {}       # options that the command itself settles


def argument(names, help=None, **options):
    """What argparse's add_argument takes, as a value."""
    return names.split(), {'help': help, **options}


def flag(names, help):
    return argument(names, help, action='store_true')


def key_arguments(base_url_help):
    return (
        argument('token', 'the token, env:NAME, file:PATH, or - for standard input; without it '
                 'you are asked, unseen', nargs='?'),
        argument('label', 'a name for it', nargs='*'),
        argument('--label', 'the same', dest='label_option', metavar='LABEL'),
        argument('--base-url', base_url_help, metavar='URL'))


NOW_OPTION = flag('--now', 'cut running answers')
JSON_OPTION = flag('--json', 'as JSON, for scripts')
COMMANDS = (
    Command('demo', 'see a failover: the proxy at work, with pretend upstreams', cmd_demo, (
        argument('--port', 'use this port', type=int, default=0, metavar='N'),
        flag('--fast', 'without pauses'),
        flag('--keep', 'go on until Ctrl-C, for the dashboard'))),
    Command('start', 'run the proxy until Ctrl-C, or with -d in the background', cmd_start, (
        flag('-d --daemon', 'in the background; returns when its ports answer'),)),
    Command('stop', 'stop the running proxy; running answers may finish', cmd_stop, (NOW_OPTION,)),
    Command('restart', 'stop it, and start it in the background', cmd_restart, (NOW_OPTION,)),
    Command('status', 'what the running proxy does: ports, keys, cooldowns, requests', cmd_status,
            (flag('--conversations', 'which conversation has its cache at which key'),
             JSON_OPTION)),
    Command('health', "the running proxy's /health as JSON; exit status 0 when all is well",
            cmd_health),
    Command('add-key', 'add an Anthropic API key or OAuth token', cmd_add_key,
            key_arguments("another server with Anthropic's API"),
            {'provider': ANTHROPIC, 'token_words': 'API key or OAuth token'}),
    Command('add-openai-key', 'add an OpenAI key or ChatGPT login, which answers where Claude '
            'cannot', cmd_add_key, key_arguments(
                "another server with OpenAI's API; where it asks for no token, any word will do"),
            {'provider': OPENAI, 'token_words': 'OpenAI API key or ChatGPT login'}),
    Command('remove-key', 'remove a key', cmd_remove_key, (
        argument('id', 'as list-keys shows it'),)),
    Command('list-keys', "the keys and each profile's order", cmd_list_keys, (JSON_OPTION,)),
    Command('config', 'open the dashboard, or read and write settings', cmd_config, (
        argument('action', 'get [FIELD], or set FIELD VALUE; without it the dashboard opens',
                 nargs='?', choices=('get', 'set')),
        argument('field', 'a setting, like queueWaitMs', nargs='?'),
        argument('value', 'JSON or a text; null: the default; -: from standard input', nargs='?'),
        flag('--path', "print the configuration file's path"))),
    Command('setup', 'have Claude Code and shells use the proxy, or start it at login',
            cmd_setup, (
        argument('--only', 'these tools, found or not', nargs='+', choices=TOOL_IDS, default=()),
        argument('--skip', 'all but these', nargs='+', choices=TOOL_IDS, default=()),
        argument('--profile', 'use the port of this profile', metavar='NAME'),
        flag('--dry-run', 'only show what would change'),
        flag('--undo', 'restore files as they were'),
        flag('--autostart', 'start at login, by launchd or systemd, and now'),
        flag('--remove-autostart', 'do not start at login any more'))),
    Command('doctor', 'look for whatever is wrong, and say what to do; a report for an issue',
            cmd_doctor),
    Command('completion', 'print what makes a shell complete these commands', cmd_completion, (
        argument('shell', choices=tuple(COMPLETIONS)),)),
    Command('logs', 'the last log lines', cmd_logs, (
        flag('-f --follow', 'go on with new lines'),
        argument('-n --lines', 'how many (20)', type=int, default=20, metavar='N'), JSON_OPTION)),
)


def argument_parser():
    import argparse
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description='A local proxy that keeps Claude Code and other Anthropic '
        'clients answered when a key is rate-limited.')
    parser.add_argument('--version', action='version', version=f'{PROGRAM} {VERSION}')
    config, words = argument('--config', f'the configuration file ({DEFAULT_CONFIG_PATH}; or '
                             'CLAUDE_FAILOVER_CONFIG)', metavar='PATH')
    parser.add_argument(*config, **words)
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    for command in COMMANDS:
        sub = commands.add_parser(command.name, help=command.help, description=command.help)
        sub.add_argument(*config, **words, default=argparse.SUPPRESS)
        for names, options in command.arguments:
            sub.add_argument(*names, **options)
        sub.set_defaults(run=command.run, **command.defaults)
    return parser


# ==============================================================================
# Main
# ==============================================================================

def main(argv=None):
    """Runs one command; its exit status."""
    prepare_output()
    hide_values_of_crashes()
    options = argument_parser().parse_args(argv)
    chosen = options.config or os.environ.get('CLAUDE_FAILOVER_CONFIG') or DEFAULT_CONFIG_PATH
    options.config = os.path.abspath(os.path.expanduser(chosen))
    try:
        return options.run(options) or 0
    except FailoverError as error:
        complain(printable(error))
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:           # the reader of a pipe had enough
        leave_output()
        return 0
    except OSError as error:
        complain(f'{options.command}: {error_reason(error)}')
        leave_output()
        return 1


def hide_values_of_crashes():
    """Has uncaught errors show kind and place alone: messages may quote fields with tokens."""
    def report(error):
        if not isinstance(error, (SystemExit, type(None))):
            with contextlib.suppress(OSError):    # nobody reads it any more
                complain(f'internal error: {type(error).__name__} at {where_raised(error)}')
    sys.excepthook = lambda kind, error, traceback: report(error)
    threading.excepthook = sys.unraisablehook = lambda failed: report(failed.exc_value)


def leave_output():
    """Keeps the interpreter from failing again on what could not be written."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def prepare_output():
    """Has output never fail on a character, nor because it was closed at the start (a daemon)."""
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, 'w'))
        getattr(sys, name).reconfigure(errors='replace')


if __name__ == '__main__':
    sys.exit(main())
