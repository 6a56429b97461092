#!/usr/bin/env python3
"""claude-failover: a local proxy that keeps Claude Code and other Anthropic clients answered.

When a key is rate-limited the next key answers; when every key is spent for a model, a
fallback model answers; when a key is about to come back, the request waits for it.

One request, from top to bottom of its path (and from bottom to top of this file):

    Handler             reads the head strictly, guards Host and Origin, matches ROUTES
    forward             makes a ClientRequest and an Exchange (both ends of one request)
    Failover.serve      plans, tries, queues, and gives the final failure
      plan_attempts     [Attempt(key, model), ...] in the profile's order
      Upstream.open     sends one attempt; an UpstreamResponse or UpstreamUnreachable
      classify          what the answer means: one row of RULES
      Cooldowns         which key rests, for which model, until when; who waits for it
      ClientResponse    the commit: after its first byte there is no failover any more
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
    Request bodies          the model in a body, and repairs that a fallback model needs
    Classification          RULES: what every upstream answer means
    Event streams           whole server-sent events, and what they said on their way through
    Cooldowns               who rests until when, and the queue of those who wait
    Journal                 the log file, the counters, the recent requests
    Configuration store     the file: atomic, private, reloaded when it changes
    Exchanges               both ends of a request, and the watcher that sees either end leave
    Client connections      request heads and bodies read strictly, answers written once
    Upstream                connections that are reused, answers that are read strictly
    Failover                one request from its plan to its answer
    HTTP server             the guard, ROUTES, a listener for each profile
    Service                 the App: puts the parts together, reloads, stops
    Command line            COMMANDS: printing happens only here
    Main

From Configuration to Event streams nothing knows a clock, file, socket or thread: values
in, values out.
Tests: python3 test_claude_failover.py
"""
from __future__ import annotations

import base64
import collections
import contextlib
import copy
import email.utils
import enum
import functools
import hashlib
import hmac
import http.client
import http.server
import itertools
import json
import math
import os
import random
import re
import select
import socket
import socketserver
import stat
import struct
import sys
import threading
import time
import urllib.parse
from datetime import datetime, timezone
from typing import Callable, NamedTuple

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
#: Bodies below this travel in one packet train with their head: one system call less.
JOIN_BYTES = 64 * 1024
#: A larger body goes in pieces of this size, with a look for an early answer between them.
SEND_BYTES = 256 * 1024
#: What one receive asks for.
RECEIVE_BYTES = 64 * 1024
#: Chunks of a request body: 32 MB in pieces of 330 bytes.
MAX_CHUNKS = 100_000
#: Interim answers (100, 103) before an upstream's real one.
MAX_INTERIM = 20
#: Each connection is a thread with two sockets; a client that opens more is out of control.
MAX_CONNECTIONS = 2000

#: Waiting for a client: each read of a head or body, the whole head, the whole body, between
#: two requests, and for a client that does not read its answer.
CLIENT_READ_S = 20
CLIENT_HEAD_S = 30
CLIENT_BODY_S = 300
CLIENT_IDLE_S = 600
CLIENT_WRITE_S = 300
#: Waiting for an upstream: the connection, the first byte of a plain answer and of a stream
#: (long thinking is silent), and between two events.
CONNECT_S = 10
FIRST_BYTE_S = 600
STREAM_FIRST_BYTE_S = 300
STREAM_IDLE_S = 300
#: Older idle connections are not trusted: a laptop that slept, a NAT that forgot, look alike.
POOL_IDLE_S = 30
POOL_SIZE = 64
#: How often the watcher looks; a client that left is noticed within this.
WATCH_S = 0.25
#: How often the configuration file is looked at.
RELOAD_S = 5
#: How long running requests may go on after the first signal.
DRAIN_S = 10

#: A held stream gets its head and a ping after this long; Claude Code warns after 20 s.
PING_S = 10
#: SDKs obey retry-after up to this; beyond it `x-should-retry: false` stops them at once.
CLIENT_PATIENCE_S = 60
#: A hint further away than this is a mistake of the upstream's (the longest window is 7 days).
ABSURD_HINT_S = 31 * 86400
#: Models in one chain of fallbacks.
MAX_CHAIN = 5
#: Different repairs of one request for one fallback model.
MAX_REPAIRS = 4
#: Cooldowns that are remembered: far more than keys times models, but not without end.
MAX_COOLDOWNS = 10_000
#: Attempts that x-proxy-attempts lists.
MAX_TOLD_ATTEMPTS = 30
#: Log lines that may wait to be written, and how long they wait, so that many go together.
MAX_LOG_LINES = 10_000
LOG_DELAY_S = 0.05
#: Requests that /health lists.
RECENT_REQUESTS = 100

HOP_BY_HOP = frozenset((
    'connection', 'keep-alive', 'proxy-authenticate', 'proxy-authorization', 'proxy-connection',
    'te', 'trailer', 'transfer-encoding', 'upgrade'))
#: Not passed upstream as they came: ours to write, or nobody's business (a cookie of
#: another program on this host).  accept-encoding becomes identity: a compressed error
#: cannot be classified, and usage is read from the stream.
OWN_REQUEST_FIELDS = HOP_BY_HOP | {
    'host', 'content-length', 'x-api-key', 'authorization', 'accept-encoding', 'expect',
    'anthropic-beta', 'cookie'}
OWN_RESPONSE_FIELDS = HOP_BY_HOP | {'content-length'}

OAUTH_BETA = 'oauth-2025-04-20'
MESSAGES_PATH = '/v1/messages'


# ==============================================================================
# Small tools
# ==============================================================================

class FailoverError(Exception):
    """An error that knows how it is answered: to API clients with `status` and `type` in
    Anthropic's shape, on the command line with its text and `exit_status`.  What its text
    quotes may be anything that a user typed: tokens in it are masked."""
    status, type, exit_status = 500, 'api_error', 1

    def __init__(self, message):
        super().__init__(redact(message))


class ConfigError(FailoverError):
    """A wrong value, from the configuration file or from an edit; names field and remedy."""
    status, type, exit_status = 400, 'invalid_request_error', 2


class UnknownKey(ConfigError):
    status, type = 404, 'not_found_error'

    def __init__(self, key_id):
        super().__init__(f'There is no key {printable(key_id)!r}. See: {RUN} list-keys')


class UsageError(FailoverError):
    """A command that cannot be carried out as it was given."""
    status, type, exit_status = 400, 'invalid_request_error', 2


class BadRequest(FailoverError):
    """A client's request that is refused before it is planned."""
    def __init__(self, message, status=400, type='invalid_request_error'):
        super().__init__(message)
        self.status, self.type = status, type


class Forbidden(FailoverError):
    """A request that some web page or another name sent."""
    status, type = 403, 'permission_error'


class ClientGone(Exception):
    """The client left; nobody is there to be answered."""


class UpstreamTimeout(Exception):
    """No answer, or no further event, in time."""


class UpstreamCut(Exception):
    """The upstream's answer ended before it was complete."""


class UpstreamClosed(UpstreamCut):
    """It ended by an orderly close: the end of a body that has no other."""


class UpstreamUnreachable(Exception):
    """No byte of an answer came.  `connected` tells a reset from a connection never made."""
    def __init__(self, reason, connected):
        super().__init__(reason)
        self.reason, self.connected = reason, connected


def error_json(type, message):
    """An error in Anthropic's shape, as bytes."""
    error = {'type': 'error', 'error': {'type': type, 'message': message}}
    return json.dumps(error).encode()


def error_reason(error):
    """Why a connection failed, without a byte of what was sent: http.client's messages can
    quote a header value, so only the operating system's own words and class names are used."""
    if isinstance(error, socket.gaierror):
        return 'name resolution failed'
    verify_message = getattr(error, 'verify_message', None)      # ssl.SSLCertVerificationError
    if verify_message:
        return f'certificate not accepted: {verify_message} (SSL_CERT_FILE names a CA file)'
    if isinstance(error, TimeoutError) or type(error).__name__ == 'timeout':
        return 'timed out'
    return getattr(error, 'strerror', None) or type(error).__name__


def mask_token(token):
    """A token as it may be shown: its kind and last four characters, fewer when it is short.

    References (`env:NAME`, `file:PATH`) are not secret and are shown whole.
    """
    if token.startswith(('env:', 'file:')):
        return printable(token)
    kind = re.match(r'sk-ant-[a-z]{1,5}|sk-proj|sk|eyJ', token)
    end = token[-4:] if len(token) >= 40 else ''
    return printable(f'{kind.group() if kind else ""}...{end}')


SECRET = re.compile(r'sk-[A-Za-z0-9_-]{8,}|eyJ[A-Za-z0-9_-]{8,}(\.[A-Za-z0-9_-]+)*')


def redact(text):
    """A text (a whole line of the log, say) with all that looks like a token masked."""
    return SECRET.sub(lambda match: mask_token(match.group()), text)


def printable(text):
    """Text without control characters, so that it cannot steer a terminal or split a line."""
    return ''.join(c if c.isprintable() else '\N{REPLACEMENT CHARACTER}' for c in str(text))


def header_text(text):
    """Text as one header value: visible ASCII and spaces, and no more than a name's length."""
    return re.sub(r'[^ -~]', '?', str(text)[:600])


def format_duration(seconds):
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


def utc_text(unix_s):
    """A unix time as '2026-03-01T12:00:00.123Z'."""
    seconds = time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(unix_s))
    return f'{seconds}.{int(unix_s * 1000) % 1000:03d}Z'


def loads_object(data):
    """The JSON object in `data`.  Raises ValueError for anything else, however odd."""
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise ValueError('nested too deeply') from error
    if not isinstance(value, dict):
        raise ValueError(f'not a JSON object but {type(value).__name__}')
    return value


def make_private_folder(folder):
    os.makedirs(folder, mode=0o700, exist_ok=True)


def write_atomically(path, data):
    """Replaces the file by `data`, private and whole or not at all.

    The temporary file stands in the real folder of the file, so that a symbolic link (a
    dotfiles repository) stays one and the final rename stays within one file system.
    """
    path = os.path.realpath(path)
    temporary = f'{path}.{os.getpid()}.{threading.get_ident()}.tmp'
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


# ==============================================================================
# Configuration
# ==============================================================================
# The JSON document is the truth; a Config is a checked, unchanging view of it.  What this
# version does not know stays in the document, so a save cannot lose it.
#
# Values are NamedTuples: as frozen as a dataclass, and at start-up 15 ms cheaper.

NAME = re.compile(r'[A-Za-z0-9._-]{1,64}')
TOKEN = re.compile(r'[!-~]+')
ANTHROPIC, OPENAI = 'anthropic', 'openai'
CLIENT_REF = 'client'


class Key(NamedTuple):
    """One credential.  `token` is the secret, or where it is read: env:NAME or file:PATH."""
    ref: str                  # 'anthropic:work': what priorityOrder calls it, and what cools
    id: str
    provider: str
    token: str
    label: str
    oauth: bool = False
    base_url: str | None = None

    def __repr__(self):       # a traceback must not show the token
        return f'Key({self.ref})'


class Profile(NamedTuple):
    """A named order of keys with its own port."""
    name: str
    port: int
    order: tuple              # ('anthropic:work', 'client', 'openai:backup', ...)


class Config(NamedTuple):
    """One checked configuration; a request keeps the one that it began with."""
    document: dict            # as read, with unknown fields; never changed in place
    profiles: dict            # name -> Profile
    keys: dict                # ref -> Key, of both providers
    model_fallback: dict
    openai_model_fallback: bool
    openai_model_mapping: dict
    openai_api: str
    anthropic_base_url: str
    openai_base_url: str
    codex_base_url: str
    cooldown_ms: int
    queue_wait_ms: int
    access_token: str | None
    allowed_hosts: list
    allowed_origins: list
    log_level: str
    max_log_size: int

    def __repr__(self):
        return f'Config({len(self.profiles)} profiles, {len(self.keys)} keys)'


class Setting(NamedTuple):
    """One top-level field: `check(value)` answers None, or what the value must be."""
    name: str
    default: object
    unit: str
    check: Callable
    help: str


def is_whole(value):
    return isinstance(value, int) and not isinstance(value, bool)


def whole_number(least, unit):
    def check(value):
        if not is_whole(value) or value < least:
            return f'must be a whole number of {unit}, {least} or more'
    return check


def one_of(*choices):
    def check(value):
        if value not in choices:
            return 'must be one of ' + ', '.join(choices)
    return check


def check_switch(value):
    if not isinstance(value, bool):
        return 'must be true or false'


def check_model_map(value):
    if not isinstance(value, dict) or not all(isinstance(v, str) and v for v in value.values()):
        return 'must be an object of model names, like {"claude-opus-*": "claude-sonnet-*"}'
    if any('*' in name[:-1] for name in value):
        return 'may have * only at the end of a name'


def check_texts(value):
    if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
        return 'must be a list of texts'


def check_access_token(value):
    if value is not None and not (isinstance(value, str) and TOKEN.fullmatch(value)):
        return 'must be a text of visible ASCII characters, or be left out'


def is_near(host):
    """Whether a host is this machine or on a private network, where plain http is usual."""
    if host == 'localhost' or '.' not in host.strip('.') and ':' not in host:
        return True
    if host.endswith(('.local', '.internal', '.lan', '.localhost')):
        return True
    import ipaddress
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_private or address.is_loopback or address.is_link_local


def check_base_url(value):
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
            check_model_map, 'the model that answers when every key is spent for another'),
    Setting('openaiModelFallback', False, 'true or false', check_switch,
            'whether OpenAI keys may answer for Claude'),
    Setting('openaiModelMapping',
            {'claude-opus-*': 'gpt-5.4', 'claude-sonnet-*': 'gpt-5.4-mini',
             'claude-haiku-*': 'gpt-5.4-nano', '*': 'gpt-5.4'}, 'model -> model',
            check_model_map, 'the OpenAI model for each Claude model'),
    Setting('openaiApi', 'chat_completions', '', one_of('chat_completions', 'responses'),
            'the wire format for OpenAI keys'),
    Setting('anthropicBaseUrl', 'https://api.anthropic.com', 'URL', check_base_url,
            'where Anthropic keys are used'),
    Setting('openaiBaseUrl', 'https://api.openai.com', 'URL', check_base_url,
            'where OpenAI keys are used'),
    Setting('codexBaseUrl', 'https://chatgpt.com/backend-api/codex', 'URL', check_base_url,
            'where ChatGPT logins are used'),
    Setting('cooldownMs', 3_600_000, 'ms', whole_number(0, 'milliseconds'),
            'the longest that any limit rests a key before it is simply tried again'),
    Setting('queueWaitMs', 90_000, 'ms', whole_number(0, 'milliseconds'),
            'how long a request may wait for a key to come back; 0 switches the queue off'),
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


#: Both providers' words for them, as the Node program wrote them; None: the token tells.
KEY_TYPES = (None, 'api-key', 'oauth', 'api_key', 'oauth_token')
KNOWN_KEY_FIELDS = ('token', 'label', 'type', 'addedAt', 'baseUrl', 'modelMapping', 'api')
KNOWN_PROFILE_FIELDS = ('port', 'keyOrder', 'openaiKeyOrder', 'priorityOrder')


def unknown_fields(config):
    """['queueWaitMS', 'profiles.work.keyorder', ...]: kept, but perhaps misspelt."""
    known = {'profiles', *KEY_FIELDS.values(), *(setting.name for setting in SETTINGS)}
    unknown = [name for name in config.document if name not in known]
    for field, known_here in (('profiles', KNOWN_PROFILE_FIELDS), ('keys', KNOWN_KEY_FIELDS),
                              ('openaiKeys', KNOWN_KEY_FIELDS)):
        for name, entry in object_field(config.document, field).items():
            unknown += [f'{field}.{name}.{own}' for own in entry if own not in known_here]
    return unknown


def attribute_name(setting_name):
    """'queueWaitMs' -> 'queue_wait_ms'."""
    return re.sub('[A-Z]', lambda m: '_' + m.group().lower(), setting_name)


def parse_config(document):
    """The Config in a JSON document.  Raises ConfigError naming the field and the remedy."""
    if not isinstance(document, dict):
        raise ConfigError('The configuration must be a JSON object: { ... }.')
    keys = {}
    for provider, field in KEY_FIELDS.items():
        for id, entry in object_field(document, field).items():
            key = parse_key(provider, f'{field}.{printable(id)}', id, entry)
            keys[key.ref] = key
    entries = object_field(document, 'profiles') or {'default': {'port': DEFAULT_PORT}}
    profiles = {name: parse_profile(name, entry, keys) for name, entry in entries.items()}
    refuse_shared_ports(profiles)
    values = {attribute_name(s.name): setting_value(document, s) for s in SETTINGS}
    return Config(document, profiles, keys, **values)


def object_field(document, field):
    value = document.get(field)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f'{field} must be an object: {{ ... }}.')
    return value


def setting_value(document, setting):
    value = document.get(setting.name)
    if value is None:                # JSON's null is the Node program's "not set"
        return setting.default
    complaint = setting.check(value)
    if complaint:
        # What may hold a password is not repeated.
        is_secret = setting.name == 'accessToken' or '@' in str(value) or '?' in str(value)
        shown = '' if is_secret else f', not {json.dumps(value)[:60]}'
        raise ConfigError(f'{setting.name} {complaint}{shown}.')
    return value


def parse_key(provider, field, id, entry):
    if not NAME.fullmatch(id):
        raise ConfigError(f'{field}: a key\'s id may hold only letters, digits, ".", "_" and "-".')
    if not isinstance(entry, dict):
        raise ConfigError(f'{field} must be an object with a "token".')
    token = entry.get('token')
    if not isinstance(token, str) or not token.strip():
        raise ConfigError(f'{field} has no token: give it "token" (the secret, "env:NAME" or '
                          '"file:PATH"), or take the key out of the file.')
    token = token.strip()
    if not TOKEN.fullmatch(token) and not token.startswith('file:'):
        raise ConfigError(f'{field}.token holds a space or a character that no token has: '
                          'copy it again.')
    if token == 'env:' or token.startswith('file:') and token[5:6] not in ('/', '~'):
        raise ConfigError(f'{field}.token must name a variable ("env:NAME") or a whole path '
                          '("file:/path" or "file:~/path").')
    if entry.get('type') not in KEY_TYPES:
        raise ConfigError(f'{field}.type must be "api-key" or "oauth".')
    label, base_url = entry.get('label'), entry.get('baseUrl')
    if label is not None and not isinstance(label, str):
        raise ConfigError(f'{field}.label must be a text.')
    complaint = None if base_url is None else check_base_url(base_url)
    if complaint:
        raise ConfigError(f'{field}.baseUrl {complaint}.')
    oauth = entry.get('type') in ('oauth', 'oauth_token')
    return Key(f'{provider}:{id}', id, provider, token, label or id, oauth, base_url)


def parse_profile(name, entry, keys):
    field = f'profiles.{printable(name)}'
    if not name or len(name) > 64 or not name.isprintable():
        raise ConfigError(f'{field}: a profile\'s name must have 1 to 64 printable characters.')
    if not isinstance(entry, dict):
        raise ConfigError(f'{field} must be an object with a "port".')
    port = entry.get('port')
    if not is_whole(port) or not 0 <= port <= 65535:
        raise ConfigError(f'{field}.port must be a number from 1 to 65535 without quotes '
                          f'(0: any free one), not {json.dumps(port)[:60]}.')
    return Profile(name, port, tuple(parse_order(field, entry, keys)))


def parse_order(field, entry, keys):
    """The refs of a profile in order; keys that it does not name follow at the end."""
    order = []
    if entry.get('priorityOrder') is not None:
        order = order_list(f'{field}.priorityOrder', entry['priorityOrder'])
        refuse_missing(f'{field}.priorityOrder', order, {*keys, CLIENT_REF})
    else:
        for provider, order_field in ORDER_FIELDS.items():
            ids = order_list(f'{field}.{order_field}', entry.get(order_field) or [])
            refuse_missing(f'{field}.{order_field}', ids, keys, f'{provider}:')
            order += [f'{provider}:{id}' for id in ids]
    return dict.fromkeys([*order, *keys])          # each once, the first place wins


def order_list(field, value):
    complaint = check_texts(value)
    if complaint:
        raise ConfigError(f'{field} {complaint}.')
    return value


def refuse_missing(field, names, known, prefix=''):
    for name in names:
        if prefix + name in known:
            continue
        meant = ' or '.join(f'"{ref}"' for ref in known if ref.partition(':')[2] == name)
        remedy = (f'write {meant}' if meant else
                  'add that key, or take the name out of the order')
        raise ConfigError(f'{field} names {printable(name)!r}, which is no key: {remedy}.')


def refuse_shared_ports(profiles):
    seen = {}
    for profile in profiles.values():
        other = seen.setdefault(profile.port, profile) if profile.port else profile
        if other is not profile:
            raise ConfigError(f'profiles.{profile.name}.port is {profile.port}, which profile '
                              f'{other.name} has already: give each its own port.')


def dump_config(config):
    """The file's bytes for a Config."""
    return (json.dumps(config.document, indent=2, ensure_ascii=False) + '\n').encode()


# ==============================================================================
# Configuration edits
# ==============================================================================
# Each answers a new Config; parse_config checks the outcome, so an edit cannot save what a
# start would refuse.

def add_key(config, token, label, added_at, base_url=None):
    """(Config with the key, the new Key).  It follows the other keys in every profile.

    Raises ConfigError when the token is there already or cannot be one.
    """
    token = token.strip()
    if not token:
        raise ConfigError('The token is empty: nothing was added.')
    for key in config.keys.values():
        if key.token == token:
            raise ConfigError(f'This token is there already, as key {key.id}.')
    if not base_url and not token.startswith(('sk-ant-', 'env:', 'file:')):
        raise ConfigError('An Anthropic token begins with "sk-ant-" (or is "env:NAME" or '
                          '"file:PATH"); a key for another server needs --base-url.')
    if SECRET.search(label):
        raise ConfigError('The label looks like a token: the token comes first, then the label.')
    document = copy.deepcopy(config.document)
    entries = document.setdefault('keys', {})
    id = free_id(label or 'key', entries)
    type = 'oauth' if token.startswith('sk-ant-oat') else 'api-key'
    entries[id] = {'token': token, 'label': label or id, 'type': type, 'addedAt': added_at}
    if base_url:
        entries[id]['baseUrl'] = base_url
    profiles = document.get('profiles') or {'default': {'port': DEFAULT_PORT}}
    document['profiles'] = profiles
    for name, profile in profiles.items():
        append_to_orders(profile, config.profiles[name].order, id)
    edited = parse_config(document)
    return edited, edited.keys[f'{ANTHROPIC}:{id}']


def append_to_orders(profile, order, id):
    """Writes the order in force into a profile's entry, and the new key behind it.  Older
    files hold a keyOrder beside a priorityOrder: both are kept in step."""
    prefix = f'{ANTHROPIC}:'
    profile['keyOrder'] = [ref[len(prefix):] for ref in order if ref.startswith(prefix)] + [id]
    if profile.get('priorityOrder') is not None:
        profile['priorityOrder'] = [*order, prefix + id]


def free_id(label, taken):
    base = re.sub(r'[^a-z0-9]+', '-', label.lower()).strip('-')[:40] or 'key'
    candidates = [base, *(f'{base}-{n}' for n in range(2, len(taken) + 3))]
    return next(id for id in candidates if id not in taken)


def remove_key(config, key_id):
    """The Config without this key, taken out of every profile's orders too.

    `key_id` is an id, or 'anthropic:ID' or 'openai:ID' where both have one.  Raises UnknownKey.
    """
    refs = [ref for ref, key in config.keys.items() if key_id in (ref, key.id)]
    if not refs:
        raise UnknownKey(key_id)
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


# ==============================================================================
# Planning
# ==============================================================================
# Which key with which model, in which order.  Knows nothing of cooldowns: the plan is what
# would be tried if every key were ready.

#: The providers that requests can be sent to.  Keys of others are kept, but not planned.
SERVED_PROVIDERS = (ANTHROPIC,)


class Attempt(NamedTuple):
    """One key tried with one model."""
    key: Key
    model: str | None      # the model asked for, or a fallback of it; None: no model named


def map_model(mapping, model):
    """The name that `mapping` gives a model; None when no row matches.

    The exact name wins, then the longest pattern ending in `*`; a `*` in the value stands
    for what the pattern's `*` matched.
    """
    if model in mapping:
        return mapping[model]
    patterns = [name for name in mapping if name.endswith('*') and model.startswith(name[:-1])]
    if not patterns:
        return None
    pattern = max(patterns, key=len)
    return mapping[pattern].replace('*', model[len(pattern) - 1:])


def model_chain(mapping, model):
    """[model, its fallback, the fallback's fallback, ...]: cycles cut, at most MAX_CHAIN."""
    chain = []
    while model and model not in chain and len(chain) < MAX_CHAIN:
        chain.append(model)
        model = map_model(mapping, model)
    return chain


def uses_clients_own(config, profile):
    """Whether the client's own credential has a place in this profile's plans."""
    return CLIENT_REF in profile.order or not any(
        key.provider in SERVED_PROVIDERS for key in config.keys.values())


def plan_attempts(config, profile, models, client_key):
    """[Attempt, ...]: every key of the profile for the first model, then for the next.

    `models` is a chain, or [None] for a request that names no model.  `client_key` stands
    for the client's own credential (None: it sent none); it is used at its place in the
    order, and where no key is configured at all.
    """
    known = {**config.keys, CLIENT_REF: client_key}
    order = [known[ref] for ref in profile.order]
    keys = [key for key in order if key and key.provider in SERVED_PROVIDERS]
    if not keys and client_key:
        keys = [client_key]
    return [Attempt(key, model) for model in models for key in keys]


# ==============================================================================
# Request bodies
# ==============================================================================
# A request is changed as little as possible: its bytes go through untouched unless the
# model changes or a repair is due.

#: Claude Code and the load of most clients name the model first: no need to parse a megabyte.
MODEL_FIRST = re.compile(rb'\s*\{\s*"model"\s*:\s*"([A-Za-z0-9._:@/\[\]-]{1,256})"')
STREAM_FIELD = re.compile(rb'"stream"\s*:\s*true')
EDGE_BYTES = 1024
#: A thinking block that no Anthropic server signed: its signature is empty.  As compact and
#: as spaced JSON has it; two plain searches cost a tenth of a pattern's.
UNSIGNED = (b'"signature":""', b'"signature": ""')


class RequestBody:
    """A request's bytes, parsed only when something needs it."""

    def __init__(self, data):
        self.data = data

    @functools.cached_property
    def json(self):
        """The JSON object, {} when the body is none: the upstream will say so in its words."""
        try:
            return loads_object(self.data)
        except ValueError:
            return {}

    @functools.cached_property
    def model(self):
        """The model that is asked for, or None."""
        match = MODEL_FIRST.match(self.data)
        if match:
            return match.group(1).decode()
        model = self.json.get('model')
        return model if isinstance(model, str) and model else None

    @property
    def seems_streamed(self):
        """Whether a stream is probably wanted: good enough for a timeout, and cheap.  Clients
        name it near one end, and searching a megabyte takes milliseconds."""
        ends = (self.data[:EDGE_BYTES], self.data[-EDGE_BYTES:])
        return any(STREAM_FIELD.search(end) for end in ends)

    @property
    def is_streamed(self):
        return self.json.get('stream') is True

    def for_model(self, model):
        """The same bytes with another model."""
        if model == self.model:
            return self.data
        match = MODEL_FIRST.match(self.data)
        if match:
            return bytes(self.data[:match.start(1)]) + model.encode() + self.data[match.end(1):]
        return dump_body({**self.json, 'model': model})


def dump_body(body):
    try:
        return json.dumps(body, ensure_ascii=False, separators=(',', ':')).encode()
    except UnicodeEncodeError:        # half an emoji: only an escape can carry it
        return json.dumps(body, separators=(',', ':')).encode()


def as_dict(value):
    """Foreign JSON where an object should be: {} when it is none."""
    return value if isinstance(value, dict) else {}


def as_list(value):
    return value if isinstance(value, list) else []


def without_thinking(body, unwanted=lambda block: True):
    """The body without the unwanted thinking blocks of assistant turns; a turn that held
    nothing else goes too, since the API refuses an empty one."""
    if not isinstance(body.get('messages'), list):
        return body
    messages = []
    for message in body['messages']:
        content = message.get('content') if isinstance(message, dict) else None
        if isinstance(content, list) and message.get('role') == 'assistant':
            kept = [block for block in content
                    if not (is_thinking(block) and unwanted(block))]
            if content and not kept:
                continue
            message = {**message, 'content': kept}
        messages.append(message)
    return {**body, 'messages': messages}


def is_thinking(block):
    return isinstance(block, dict) and block.get('type') in ('thinking', 'redacted_thinking')


def is_unsigned(block):
    return block.get('type') == 'thinking' and not block.get('signature')


def without_path(value, path):
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


def without_thinking_edits(body):
    """Without `context_management` edits about thinking: they need `thinking` itself."""
    management = body.get('context_management')
    if not isinstance(management, dict):
        return body
    edits = [edit for edit in as_list(management.get('edits'))
             if 'thinking' not in str(as_dict(edit).get('type'))]
    if edits:
        return {**body, 'context_management': {**management, 'edits': edits}}
    return without_path(body, ['context_management'])


def smaller(number, text):
    return min(number, int(text)) if is_whole(number) else int(text)


class Repair(NamedTuple):
    """How to send a request without one thing that a model lacks.

    `pattern` finds the complaint in a 400's message; `edit(body, subject)` and, for a beta,
    the header lose the subject, which is the pattern's first group or ''.
    """
    name: str
    pattern: str
    edit: Callable = lambda body, subject: body


REPAIRS = (
    Repair('signature', r'signature.{0,5} in .{0,3}(?:redacted_)?thinking|thinking\.signature',
           lambda body, subject: without_thinking(body)),
    Repair('beta', r'(?<![a-z0-9-])([a-z][a-z0-9-]*-\d{4}-\d\d-\d\d)[`"\']*.{0,20}anthropic-beta'
                   r'|anthropic-beta\D{0,40}?([a-z][a-z0-9-]*-\d{4}-\d\d-\d\d)'),
    Repair('field', r'^([A-Za-z_][\w.-]*): extra inputs are not permitted',
           lambda body, subject: without_path(body, subject.split('.'))),
    Repair('max_tokens', r'max_tokens: \d+ > (\d{1,9})',
           lambda body, subject: {**body, 'max_tokens': smaller(body.get('max_tokens'), subject)}),
    Repair('effort', r'\beffort\b', lambda body, subject: without_path(without_path(
        body, ['output_config', 'effort']), ['messages', '0', 'output_config', 'effort'])),
    Repair('output_config', r'output_config',
           lambda body, subject: without_path(body, ['output_config'])),
    Repair('context_management', r'context_management',
           lambda body, subject: without_path(body, ['context_management'])),
    Repair('thinking', r'thinking', lambda body, subject: without_thinking_edits(
        without_path(body, ['thinking']))),
)


def find_repair(message):
    """(name, subject) of the first repair that fits a 400's message, or None."""
    for repair in REPAIRS:
        match = re.search(repair.pattern, message[:MAX_MESSAGE_CHARS], re.IGNORECASE)
        if match:
            return repair.name, next((group for group in match.groups() if group), '')
    return None


def apply_repairs(repairs, data, betas):
    """(body bytes, beta names) after some (name, subject) repairs."""
    by_name = {repair.name: repair for repair in REPAIRS}
    body = loads_object(data)
    for name, subject in repairs:
        body = by_name[name].edit(body, subject)
        if name == 'beta':
            betas = [beta for beta in betas if beta != subject]
    return dump_body(body), betas


def drop_unsigned_thinking(data):
    """The body's bytes without thinking that Anthropic did not sign (another provider's
    answer is in the history); the same bytes where there is none."""
    if b'"signature"' not in data or not any(mark in data for mark in UNSIGNED):
        return data
    try:
        body = loads_object(data)
    except ValueError:
        return data
    stripped = without_thinking(body, is_unsigned)
    return data if stripped == body else dump_body(stripped)


# ==============================================================================
# Classification
# ==============================================================================
# What an upstream's answer means.  Knows statuses, headers and texts; does not know which
# other keys there are: a rule says "this key and model, for 30 seconds", Failover acts.

class Step(enum.Enum):
    """What follows an answer."""
    RELAY = 'the client gets it'
    REPAIR = 'the same key once more, without what it complained about'
    NEXT_KEY = 'the next key; after the keys, the next model'
    STOP = 'nothing more is tried'


class Scope(enum.Enum):
    """What a cooldown covers."""
    KEY = 'the key, for every model'
    PAIR = 'the key, for this model'


class Final(enum.Enum):
    """How the client hears of it when nothing is left to try."""
    VERBATIM = 'the answer itself'
    LIMITED = '429 rate_limit_error'
    OVERLOADED = '529 overloaded_error'
    SERVER = '502 api_error'
    BLOCKED = '502 api_error naming the key'
    UNAUTHORIZED = '401, or 502 naming the keys when there are several'
    TIMEOUT = '504 timeout_error'


class Again(enum.Enum):
    """When the same key is tried once more, after a moment."""
    NEVER = 0
    FIRST = 1                 # before another key
    ALONE = 2                 # only if no other key is ready


class Answer(NamedTuple):
    """An upstream's answer, as far as its meaning goes."""
    status: int
    headers: dict             # lower-case name -> value
    error_type: str
    message: str              # error.message, or the body's beginning when it has no such shape
    now: float                # unix seconds, for reset times
    path: str = MESSAGES_PATH
    model: str | None = None
    is_fallback: bool = False


class Rule(NamedTuple):
    """One row of the policy: an answer with one of `statuses` (empty: any) for which `when`
    holds means `step`.  What cools is `scope` (None: nothing), for what `hint(answer)` reads
    from the answer, else `cooldown_s`, doubling up to `doubles_to_s` while it repeats."""
    name: str
    statuses: tuple           # or a range
    step: Step
    final: Final = Final.VERBATIM
    when: Callable = lambda answer: True
    scope: Scope | None = None
    cooldown_s: float = 0
    doubles_to_s: float = 0
    hint: Callable = lambda answer: None
    again: Again = Again.NEVER
    tries: int = 1_000        # so many such answers for one model, and it is given up
    strikes: int = 1          # cools at so many in a row
    other_models: bool = True
    waits: bool = True        # whether a request may queue for the end of such a cooldown
    attention: bool = False   # a person has to do something about this key


class Outcome(NamedTuple):
    """What one attempt came to."""
    rule: Rule
    status: int               # 0 when there was no answer
    message: str
    hint_s: float | None


def parse_retry_after(value, now):
    """Seconds to wait from a Retry-After field; None when absent, unreadable or absurd.

    Reads delay-seconds, also with a fraction, and HTTP-date (RFC 9110 section 10.2.3); a
    past date gives 0.
    """
    value = (value or '').strip()
    if re.fullmatch(r'[0-9]{1,12}(\.[0-9]{1,9})?', value):
        seconds = float(value)
    else:
        try:
            seconds = max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
        except (TypeError, ValueError, IndexError, OverflowError):
            return None
    return seconds if seconds <= ABSURD_HINT_S else None


def parse_reset(value, now):
    """Seconds until a rate-limit reset: unix seconds, or RFC 3339.  None when unreadable,
    past or absurd."""
    value = (value or '').strip()
    try:
        if re.fullmatch(r'[0-9]{1,12}(\.[0-9]{1,9})?', value):
            seconds = float(value) - now
        else:
            moment = datetime.fromisoformat(value.replace('Z', '+00:00').replace('z', '+00:00'))
            seconds = moment.replace(tzinfo=moment.tzinfo or timezone.utc).timestamp() - now
    except (ValueError, OverflowError):
        return None
    return seconds if 0 < seconds <= ABSURD_HINT_S else None


UNIFIED = re.compile(r'anthropic-ratelimit-unified-(?:(.+)-)?status')
REMAINING = re.compile(r'(anthropic-ratelimit-.+)-remaining')


def rejected_windows(headers):
    """{window: seconds-text of its reset} of the unified windows that are rejected.

    Windows are found by the headers' shape, not from a list: '5h', '7d', '7d_opus' ...; ''
    is the unnamed summary.  'overage' is no window: it says whether extra usage is bought.
    """
    windows = {}
    for name, value in headers.items():
        match = UNIFIED.fullmatch(name)
        if match and value.strip().lower() == 'rejected' and match.group(1) != 'overage':
            reset_name = name[:-len('status')] + 'reset'
            windows[match.group(1) or ''] = headers.get(reset_name, '')
    return windows


def whole_key_rejected(answer):
    """Whether a window that covers every model is spent: 5h or 7d, or only the summary says so."""
    windows = rejected_windows(answer.headers)
    return bool(windows) and (not set(windows) - {''} or bool({'5h', '7d'} & set(windows)))


def seconds_to_window_reset(answer):
    windows = rejected_windows(answer.headers)
    named = {w: reset for w, reset in windows.items() if w} or windows
    resets = [parse_reset(reset, answer.now) for reset in named.values()]
    resets.append(parse_reset(windows.get(''), answer.now) if not any(resets) else None)
    known = [seconds for seconds in resets if seconds is not None]
    if known:
        return max(known)
    return parse_retry_after(answer.headers.get('retry-after'), answer.now)


def seconds_to_limit_reset(answer):
    """From retry-after, else from the latest reset of a limit whose remainder is 0."""
    seconds = parse_retry_after(answer.headers.get('retry-after'), answer.now)
    if seconds is not None:
        return seconds
    resets = []
    for name, value in answer.headers.items():
        match = REMAINING.fullmatch(name)
        if match and value.strip() == '0':
            reset = parse_reset(answer.headers.get(match.group(1) + '-reset'), answer.now)
            resets.append(reset or 0)
    return max(resets, default=0) or None


def seconds_to_regained_access(answer):
    """From "You will regain access on 2026-03-01 at 00:00 UTC."; None when it has no date."""
    match = re.search(r'regain access on (\d{4}-\d\d-\d\d)(?: at (\d\d:\d\d))?', answer.message)
    if not match:
        return None
    return parse_reset(f'{match.group(1)}T{match.group(2) or "00:00"}:00Z', answer.now)


def says(pattern):
    """A condition: the error's type or message matches, whatever its case."""
    found = re.compile(pattern, re.IGNORECASE).search
    return lambda answer: bool(found(answer.error_type) or found(answer.message))


def names_model(answer):
    return bool(answer.model) and (
        answer.model in answer.message or re.match(r'models?\b', answer.message) is not None)


def lacks_rate_limit_fields(answer):
    return 'retry-after' not in answer.headers and not any(
        name.startswith('anthropic-ratelimit-') for name in answer.headers)


def is_bad_signature(answer):
    repair = find_repair(answer.message)
    return repair is not None and repair[0] == 'signature'


def is_unsupported_by_fallback(answer):
    """Claude Code mends such 400s of the model that it asked for by itself, by their wording;
    of a fallback it does not know."""
    return answer.is_fallback and find_repair(answer.message) is not None


#: The policy, first match first.  A new status or wording is a row.
RULES = (
    Rule('answered', range(200, 400), Step.RELAY),
    Rule('no_credit', (400,), Step.NEXT_KEY, scope=Scope.KEY, cooldown_s=3600,
         when=says('credit balance is too low'), waits=False, attention=True),
    Rule('usage_limit', (400,), Step.NEXT_KEY, scope=Scope.KEY, cooldown_s=3600,
         when=says('reached your specified .{0,20}usage limits'), hint=seconds_to_regained_access,
         waits=False, attention=True),
    Rule('disabled', (400, 403), Step.NEXT_KEY, Final.BLOCKED, scope=Scope.KEY, cooldown_s=3600,
         when=says('organization (has been|is) disabled|oauth .{0,80}not (allowed|supported)'
                   '.{0,80}organization|organization .{0,80}not .{0,80}oauth'),
         waits=False, attention=True),
    Rule('bad_signature', (400,), Step.REPAIR, when=is_bad_signature),
    Rule('unsupported_field', (400,), Step.REPAIR, when=is_unsupported_by_fallback),
    Rule('auth_failed', (401,), Step.NEXT_KEY, Final.UNAUTHORIZED, scope=Scope.KEY,
         cooldown_s=300, doubles_to_s=3600, waits=False, attention=True),
    Rule('billing', (402,), Step.NEXT_KEY, scope=Scope.KEY, cooldown_s=3600, waits=False,
         attention=True),
    Rule('forbidden', (403,), Step.NEXT_KEY, Final.BLOCKED, scope=Scope.PAIR, cooldown_s=600,
         waits=False, attention=True),
    Rule('unknown_model', (404,), Step.NEXT_KEY, scope=Scope.PAIR, cooldown_s=3600,
         when=names_model, waits=False),
    Rule('other_limit', (429,), Step.NEXT_KEY, other_models=False,
         when=lambda answer: answer.path != MESSAGES_PATH),
    Rule('window_spent', (429,), Step.NEXT_KEY, Final.LIMITED, scope=Scope.KEY, cooldown_s=300,
         when=whole_key_rejected, hint=seconds_to_window_reset),
    Rule('family_window_spent', (429,), Step.NEXT_KEY, Final.LIMITED, scope=Scope.PAIR,
         cooldown_s=300, when=lambda answer: bool(rejected_windows(answer.headers)),
         hint=seconds_to_window_reset),
    Rule('spend_limit', (429,), Step.NEXT_KEY, Final.LIMITED, scope=Scope.KEY, cooldown_s=3600,
         when=says('enforced_spend_limit_reached'), waits=False, attention=True),
    Rule('extra_usage', (429,), Step.NEXT_KEY, scope=Scope.PAIR, cooldown_s=300,
         when=lambda answer: says('extra usage')(answer) or 'out_of_credits' in answer.headers.get(
             'anthropic-ratelimit-unified-overage-disabled-reason', ''), waits=False),
    Rule('rate_limited', (429,), Step.NEXT_KEY, Final.LIMITED, scope=Scope.PAIR, cooldown_s=30,
         when=lambda answer: seconds_to_limit_reset(answer) is not None,
         hint=seconds_to_limit_reset),
    Rule('request_limited', (429,), Step.NEXT_KEY, tries=2, other_models=False,
         when=lambda answer: lacks_rate_limit_fields(answer)
         and answer.headers.get('x-should-retry', '').lower() == 'true'),
    Rule('throttled', (429,), Step.NEXT_KEY, Final.LIMITED, scope=Scope.PAIR, cooldown_s=30,
         doubles_to_s=300),
    Rule('overloaded', (529,), Step.NEXT_KEY, Final.OVERLOADED, scope=Scope.PAIR, cooldown_s=10,
         again=Again.ALONE, tries=2),
    Rule('server_error', (408, 500, 502, 503, 504, *range(520, 528)), Step.NEXT_KEY, Final.SERVER,
         scope=Scope.PAIR, cooldown_s=15, again=Again.FIRST, tries=3, strikes=3),
    Rule('relayed', (), Step.RELAY),
)

#: What befalls an attempt without an answer.
UNREACHABLE = Rule('unreachable', (), Step.NEXT_KEY, Final.SERVER, scope=Scope.KEY,
                   cooldown_s=15, strikes=3)
RESET = UNREACHABLE._replace(name='reset')
TIMED_OUT = Rule('timed_out', (), Step.STOP, Final.TIMEOUT)
NO_TOKEN = Rule('no_token', (), Step.NEXT_KEY, Final.UNAUTHORIZED, waits=False, attention=True)

#: The status behind an `error` event, by its type (docs: errors; treat an unknown one as 500).
STATUS_OF_ERROR = {
    'invalid_request_error': 400, 'authentication_error': 401, 'billing_error': 402,
    'permission_error': 403, 'not_found_error': 404, 'request_too_large': 413,
    'rate_limit_error': 429, 'timeout_error': 504, 'overloaded_error': 529}


def classify(answer):
    """The Outcome of an Answer: the first row of RULES that fits."""
    rule = next(rule for rule in RULES
                if (not rule.statuses or answer.status in rule.statuses) and rule.when(answer))
    return Outcome(rule, answer.status, redact(answer.message), rule.hint(answer))


def read_error(body):
    """(type, message) of an error body; of one in no known shape ('', its beginning).

    Cut to what a person would read: patterns are searched in it, on a thread that holds up
    the others meanwhile.
    """
    try:
        error = loads_object(body).get('error')
    except ValueError:
        error = None
    if not isinstance(error, dict):
        return '', printable(bytes(body[:200]).decode('utf-8', 'replace')).strip()
    details = error.get('details')
    code = details.get('error_code') if isinstance(details, dict) else None
    type = f'{error.get("type") or ""} {code or ""}'.strip()
    return type[:MAX_MESSAGE_CHARS], str(error.get('message') or '')[:MAX_MESSAGE_CHARS]


# ==============================================================================
# Event streams
# ==============================================================================
# A stream is passed on in whole events, unchanged, so that a cut never leaves half an event
# with the client.  Format: https://html.spec.whatwg.org/multipage/server-sent-events.html

EVENT_END = re.compile(rb'\r?\n\r?\n')
HELD_BACK = ('message_start', 'ping')


def event_bytes(event):
    """One event as it goes over the wire; `event` is its data, with its `type`."""
    return f'event: {event["type"]}\ndata: {json.dumps(event)}\n\n'.encode()


def error_event(type, message):
    return event_bytes({'type': 'error', 'error': {'type': type, 'message': message}})


PING_EVENT = event_bytes({'type': 'ping'})


class MessageStream:
    """Cuts a stream of the Messages API into whole events and remembers what they said."""

    def __init__(self):
        self._tail = b''          # the beginning of an event whose end has not come
        self.opened_by = None     # the type of the first event that is more than a greeting
        self.error = None         # the `error` object of an error event
        self.stopped = False      # message_stop came
        self.stop_reason = None
        self.usage = {}           # {'input_tokens': 10, 'output_tokens': 20, ...}, latest wins

    def feed(self, data):
        """The whole events among the bytes so far, b'' when there is none yet."""
        if self._tail:
            data = self._tail + data
        lf, crlf = data.rfind(b'\n\n'), data.rfind(b'\r\n\r\n')
        end = max(lf + 2 if lf >= 0 else 0, crlf + 4 if crlf >= 0 else 0)
        if not end and len(data) > MAX_EVENT_BYTES:
            end = len(data)
        events, self._tail = data[:end], data[end:]
        # Text deltas, nearly all of a stream, need not be parsed.
        if (not self.opened_by or b'message_delta' in events or b'message_stop' in events
                or b'error' in events):
            for event in EVENT_END.split(events):
                self._note(event)
        return events

    def last(self):
        """The last event of a stream that ended without the blank line after it; b'' when
        what is left is no whole event."""
        return self._tail + b'\n\n' if self._note(self._tail) else b''

    def _note(self, event):
        """Remembers what matters of one event; whether it was one, with a JSON object."""
        data = b'\n'.join(line[5:] for line in event.splitlines() if line.startswith(b'data:'))
        try:
            event = loads_object(data)
        except ValueError:        # a comment, an empty block, or no JSON: passed on all the same
            return False
        type = event.get('type')
        if type not in HELD_BACK:
            self.opened_by = self.opened_by or str(type)
        if type == 'error':
            self.error = as_dict(event.get('error'))
        elif type == 'message_stop':
            self.stopped = True
        elif type == 'message_start':
            self._note_usage(as_dict(event.get('message')).get('usage'))
        elif type == 'message_delta':
            self.stop_reason = as_dict(event.get('delta')).get('stop_reason') or self.stop_reason
            self._note_usage(event.get('usage'))
        return True

    def _note_usage(self, usage):
        self.usage.update({k: v for k, v in as_dict(usage).items() if is_whole(v)})


# ==============================================================================
# Cooldowns
# ==============================================================================
# Who rests until when, and the queue of those who wait for it.  Skipping a key and waiting
# for it ask the same question here, so they cannot disagree.

class Cooling(NamedTuple):
    """One cooldown: of a key, or of a key and model."""
    key: Key
    model: str | None      # None: every model
    until: float              # on this object's clock
    outcome: Outcome


class Ticket:
    """A request's place in the queue.  `wake` is set whenever looking again may be worth it."""

    def __init__(self, wake):
        self.slots = frozenset()      # {(ref, model), ...}: what it waits for
        self.trying = None            # the one of them that it tries now; it bars no other
        self.wake = wake


class Cooldowns:
    """Cooldowns and the queue.  A slot is (key's ref, model), or (ref, None) for a whole key.

    A cooldown whose time is over stays on record until an answer proves the slot: while it
    does, only the first in the queue may try it, so that a returning key meets no stampede.
    """

    def __init__(self, clock=time.monotonic):
        self._clock = clock
        self._lock = threading.Lock()
        self._cooling = {}    # slot -> Cooling
        self._repeats = {}    # (slot, rule name) -> cooldowns in a row that doubled
        self._strikes = {}    # (slot, rule name) -> such answers in a row
        self._queue = []      # [Ticket, ...], first come first

    def cool(self, key, model, outcome, limit_s):
        """Rests what the outcome's rule says, at most `limit_s`; the seconds, 0 for none.

        A cooldown never shortens a longer one.
        """
        rule = outcome.rule
        if rule.scope is None:
            return 0
        slot = (key.ref, None if rule.scope is Scope.KEY else model)
        with self._lock:
            now = self._clock()
            if not self._struck_out_locked(slot, rule):
                return 0
            # A second at least: a hint of 0 must not become a busy loop of the queue.
            seconds = min(max(1, self._length_locked(slot, outcome, now)), limit_s)
            current = self._cooling.get(slot)
            if seconds > 0 and not (current and current.until >= now + seconds):
                self._cooling[slot] = Cooling(key, slot[1], now + seconds, outcome)
            self._prune_locked(now)
            self._wake_locked()
        return seconds

    def _struck_out_locked(self, slot, rule):
        if rule.strikes == 1:
            return True
        strikes = self._strikes.get((slot, rule.name), 0) + 1
        self._strikes[slot, rule.name] = strikes
        return strikes >= rule.strikes

    def _length_locked(self, slot, outcome, now):
        rule = outcome.rule
        if outcome.hint_s is not None:
            return outcome.hint_s
        if not rule.doubles_to_s:
            return rule.cooldown_s
        current = self._cooling.get(slot)
        if current and current.until > now and current.outcome.rule is rule:
            return current.until - now        # two requests met the same limit: one repeat
        repeats = self._repeats.get((slot, rule.name), 0)
        self._repeats[slot, rule.name] = repeats + 1
        return min(rule.cooldown_s * 2 ** min(repeats, 20), rule.doubles_to_s)

    def succeeded(self, ref, model):
        """An answer proved this key and model; a whole key's past troubles are over too."""
        pair, whole = (ref, model), (ref, None)
        if model is None:
            return            # another path's answer proves nothing about messages
        if not (self._cooling or self._strikes or self._repeats):
            return                            # the usual case, without the lock
        with self._lock:
            self._cooling.pop(pair, None)
            if whole in self._cooling and self._cooling[whole].until <= self._clock():
                del self._cooling[whole]
            self._forget_locked(lambda slot: slot in (pair, whole))
            self._wake_locked()

    def clear(self, ref=None, model=None):
        """Ends cooldowns early: all, a key's, or a key and model's.  The number ended."""
        def is_meant(slot):
            return (ref is None or slot[0] == ref) and (model is None or slot[1] == model)
        with self._lock:
            ended = [slot for slot in self._cooling if is_meant(slot)]
            for slot in ended:
                del self._cooling[slot]
            self._forget_locked(is_meant)
            self._wake_locked()
        return len(ended)

    def _forget_locked(self, is_meant):
        """Lets repeats and strikes of some slots begin anew."""
        for history in (self._repeats, self._strikes):
            for entry in [entry for entry in history if is_meant(entry[0])]:
                del history[entry]

    def blocking(self, slot, ticket=None):
        """The Cooling that keeps this slot from being tried now; None when it may be tried.

        It may have ended already: then another request is proving the slot, and `ticket`
        (or the caller, who has none) is behind it in the queue.
        """
        if not self._cooling:
            return None                       # the usual case, without the lock
        with self._lock:
            return self._blocking_locked(slot, ticket)

    def _blocking_locked(self, slot, ticket):
        entries = [self._cooling[s] for s in {slot, (slot[0], None)} if s in self._cooling]
        if not entries:
            return None
        longest = max(entries, key=lambda cooling: cooling.until)
        if longest.until > self._clock():
            return longest
        first = next((t for t in self._queue
                      if slot in t.slots and t.trying in (None, slot)), ticket)
        return longest if first is not ticket else None

    def remaining_s(self, cooling):
        return max(0.0, cooling.until - self._clock())

    def join_queue(self, wake):
        ticket = Ticket(wake)
        with self._lock:
            self._queue.append(ticket)
        return ticket

    def await_slots(self, ticket, slots):
        """From now on the ticket waits for any of these slots."""
        with self._lock:
            ticket.slots, ticket.trying = frozenset(slots), None
            self._wake_locked()

    def try_slot(self, ticket, slot):
        """From now on the ticket's request is busy with this slot, and bars only that."""
        with self._lock:
            ticket.trying = slot
            self._wake_locked()

    def leave_queue(self, ticket):
        with self._lock:
            if ticket in self._queue:
                self._queue.remove(ticket)
                self._wake_locked()

    def seconds_to_turn(self, ticket):
        """(seconds, is_behind): until this ticket may try one of its slots.  0 is now, infinity
        never by itself; behind a request that is proving a slot, `wake` will tell."""
        ticket.wake.clear()
        with self._lock:
            now, nearest, is_behind = self._clock(), math.inf, False
            for slot in ticket.slots:
                cooling = self._blocking_locked(slot, ticket)
                if cooling is None:
                    return 0, False
                if cooling.until <= now:
                    is_behind = True
                elif cooling.outcome.rule.waits:
                    nearest = min(nearest, cooling.until - now)
        return nearest, is_behind

    def wake_all(self):
        with self._lock:
            self._wake_locked()

    def _wake_locked(self):
        for ticket in self._queue:
            ticket.wake.set()

    def _prune_locked(self, now):
        """Keeps the records bounded: clients may name any number of models."""
        for record in (self._repeats, self._strikes):
            if len(record) > MAX_COOLDOWNS:
                record.clear()
        if len(self._cooling) > MAX_COOLDOWNS:
            by_end = sorted(self._cooling, key=lambda slot: self._cooling[slot].until)
            for slot in by_end[:MAX_COOLDOWNS // 2]:
                del self._cooling[slot]

    def snapshot(self):
        """[(Cooling, seconds left), ...] of all that cools now, the earliest return first."""
        with self._lock:
            now = self._clock()
            current = [(c, c.until - now) for c in self._cooling.values() if c.until > now]
        return sorted(current, key=lambda pair: pair[1])

    def queue_length(self):
        with self._lock:
            return len(self._queue)


# ==============================================================================
# Journal
# ==============================================================================
# What happened: the log file, the counters, the recent requests.  Nothing here may stop a
# request: a full disk costs log lines, not answers.

LEVELS = ('debug', 'info', 'warn', 'error')
LINE_ENCODER = json.JSONEncoder(default=str)


class JsonLog:
    """One JSON object a line, rotated to PATH.1 at `max_bytes`.

    After `start` a thread of its own writes, a batch at a time: a write for each request,
    under one lock, would make all requests wait in line (a third of their throughput).
    """

    def __init__(self, path, level='info', max_bytes=5_242_880, now=time.time):
        self.path, self._now = path, now
        self._lock = threading.Lock()             # held for appending and rotating
        self._lines = collections.deque(maxlen=MAX_LOG_LINES)
        self._has_lines = threading.Event()
        self._is_started = False
        self._file = None
        self.failed = False       # the last lines could not be written
        self.configure(level, max_bytes)

    def configure(self, level, max_bytes):
        self._least, self._max_bytes = LEVELS.index(level), max_bytes

    def start(self):
        self._is_started = True
        threading.Thread(target=self._run, name='log', daemon=True).start()

    def write(self, level, event, **fields):
        """Logs one line.  Levels: `error` needs a person, `warn` was handled, `info` is a
        change or a finished request, `debug` is for us."""
        if LEVELS.index(level) < self._least:
            return
        record = {'time': utc_text(self._now()), 'level': level, 'event': event, **fields}
        self._lines.append(redact(LINE_ENCODER.encode(record)).encode() + b'\n')
        if not self._is_started:
            self.flush()
        elif not self._has_lines.is_set():
            self._has_lines.set()

    def _run(self):
        while True:
            self._has_lines.wait()
            time.sleep(LOG_DELAY_S)
            self._has_lines.clear()
            self.flush()

    def flush(self):
        """Writes all lines that wait."""
        with self._lock:
            data = b''
            while self._lines:
                data += self._lines.popleft()
            if not data:
                return
            try:
                self._append_locked(data)
                self.failed = False
            except OSError:       # a full disk must not stop a request; /health shows it
                self.failed, self._file = True, None

    def _append_locked(self, data):
        if self._file is None:
            make_private_folder(os.path.dirname(self.path))
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            self._file = os.fdopen(descriptor, 'ab', buffering=0)
            self._size = os.fstat(descriptor).st_size
        self._file.write(data)
        self._size += len(data)
        if self._size >= self._max_bytes:
            self._file.close()
            self._file = None
            os.replace(self.path, self.path + '.1')

    def close(self):
        self.flush()
        with self._lock:
            if self._file:
                self._file.close()
                self._file = None

    def debug(self, event, **fields):
        self.write('debug', event, **fields)

    def info(self, event, **fields):
        self.write('info', event, **fields)

    def warn(self, event, **fields):
        self.write('warn', event, **fields)

    def error(self, event, **fields):
        self.write('error', event, **fields)


class Metrics:
    """Counters since the start, and the last finished requests."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counts = collections.Counter()
        self._served_by = collections.Counter()     # key id -> answers
        self._recent = collections.deque(maxlen=RECENT_REQUESTS)

    def finished(self, record):
        """Counts one finished request; `record` is what the log line says of it."""
        attempts = record['attempts']
        keys = {attempt['key'] for attempt in attempts}
        with self._lock:
            counts = self._counts
            counts['requests'] += 1
            counts[record['outcome']] += 1
            counts['rotations'] += max(0, len(keys) - 1)
            counts['fallbacks'] += record.get('fallback') is not None
            counts['queued'] += record.get('queued_ms', 0) > 0
            counts['input_tokens'] += record.get('input_tokens', 0)
            counts['output_tokens'] += record.get('output_tokens', 0)
            if record.get('key'):
                self._served_by[record['key']] += 1
            self._recent.append(record)

    def snapshot(self):
        """{'requests': 3, 'answered': 2, ..., 'by_key': {...}} and the recent, newest first."""
        names = ('requests', 'answered', 'failed', 'refused', 'client_gone', 'rotations',
                 'fallbacks', 'queued', 'input_tokens', 'output_tokens')
        with self._lock:
            counts = {name: self._counts[name] for name in names}
            return {**counts, 'by_key': dict(self._served_by)}, list(reversed(self._recent))


class Journal:
    """The log and the counters together: where a finished request is told."""

    def __init__(self, log, metrics):
        self.log, self.metrics = log, metrics

    def finished(self, record):
        self.metrics.finished(record)
        level = 'warn' if record['outcome'] == 'failed' else 'info'
        self.log.write(level, 'request', **record)


# ==============================================================================
# Configuration store
# ==============================================================================

class ConfigStore:
    """The configuration file: `current` is the Config in force, `update` the only writer."""

    def __init__(self, path):
        self.path = path
        self.current = parse_config({})
        self.problem = None           # why the file as it is now is not in force, or None
        self.notice = None            # something done to the file that its owner should know
        self._lock = threading.Lock()
        self._signature = None        # of the file that `current` or `problem` came from

    def load(self):
        """Reads the file; one that is not there means the defaults.  Raises ConfigError."""
        with self._lock:
            self._signature = self._look()
            self.current = self._read()

    def reload_if_changed(self):
        """Takes up a changed file, if it is right; whether anything changed.  When it is
        wrong the Config in force stays, and `problem` says why."""
        with self._lock:
            signature = self._look()
            if signature == self._signature:
                return False
            self._signature = signature
            if signature is None:
                self.problem = f'{self.path} is gone: the configuration before stays in force.'
                return True
            try:
                self.current, self.problem = self._read_present(), None
            except FileNotFoundError: # an editor is replacing it in this moment: look again
                self._signature = None
                return False
            except ConfigError as error:
                self.problem = str(error)
            return True

    def update(self, edit):
        """Applies `edit(Config) -> Config` to the file as it is on disk now, and saves it.

        The folder is locked against other processes of ours; an editor knows no lock, so the
        file is looked at once more before it is replaced, and the edit done again when it
        changed.  Raises ConfigError, when the file is wrong too: a broken file is never
        overwritten.
        """
        with self._lock, self._folder_locked():
            while True:
                signature = self._look()
                config = edit(self._read())
                if self._look() == signature:
                    break
            try:
                write_atomically(self.path, dump_config(config))
            except OSError as error:
                raise FailoverError(f'{self.path} could not be written ({error.strerror}): '
                                    'nothing was changed.') from error
            self._signature, self.current, self.problem = self._look(), config, None
        return config

    def _look(self):
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f'{self.path} cannot be read ({error.strerror}).') from error
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self):
        try:
            return self._read_present()
        except FileNotFoundError:
            return parse_config({})

    def _read_present(self):
        try:
            with open(self.path, 'rb') as file:
                self._make_private(file)
                data = file.read()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ConfigError(f'{self.path} cannot be read ({error.strerror}).') from error
        try:
            document = json.loads(data.decode('utf-8-sig'))
        except json.JSONDecodeError as error:
            raise ConfigError(f'{self.path} is not valid JSON: line {error.lineno}, column '
                              f'{error.colno}: {error.msg}. Correct it there.') from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f'{self.path} is not valid JSON in UTF-8. Correct it.') from error
        try:
            return parse_config(document)
        except ConfigError as error:
            raise ConfigError(f'{self.path}: {error}') from error

    def _make_private(self, file):
        found = os.fstat(file.fileno())
        mode = found.st_mode & 0o777
        if not (mode & 0o077 and stat.S_ISREG(found.st_mode) and hasattr(os, 'fchmod')):
            return
        try:
            os.fchmod(file.fileno(), 0o600)
            self.notice = f'{self.path} was readable by others (mode {mode:o}); it is 600 now.'
        except OSError:               # another owner's, or a read-only mount
            self.notice = (f'{self.path} is readable by others (mode {mode:o}) and that cannot '
                           'be changed from here: make it 600.')

    @contextlib.contextmanager
    def _folder_locked(self):
        folder = os.path.dirname(os.path.realpath(self.path))
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
            os.close(descriptor)      # and with it the lock goes


# ==============================================================================
# Exchanges
# ==============================================================================

def readable(sockets):
    """Those of some sockets that have bytes, an end or an error waiting, without waiting."""
    if not hasattr(select, 'poll'):               # Windows
        return select.select(sockets, [], [], 0)[0]
    return polled(sockets, select.POLLIN)


def departed(sockets):
    """Those of some sockets whose peer has closed its side."""
    if not hasattr(select, 'POLLRDHUP'):          # not Linux
        return [sock for sock in readable(sockets) if has_left(sock)]
    return polled(sockets, select.POLLRDHUP)


def polled(sockets, event):
    """Those of some sockets at which an event, or an error, waits."""
    poll = select.poll()
    by_number = {}
    for sock in sockets:
        number = sock.fileno()
        if number >= 0:                           # closed in this moment by its own thread
            by_number[number] = sock
            poll.register(number, event)
    return [by_number[number] for number, _ in poll.poll(0)]


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

    def __init__(self, client_socket, clock=time.monotonic):
        self.client_socket = client_socket
        self.deadline = None          # on `clock`: the upstream is given up after it
        self.gone = False             # the client left
        self.timed_out = False        # the upstream was given up
        self.wake = threading.Event() # ends a pause or a wait in the queue
        self._clock = clock
        self._upstream_socket = None
        self._lock = threading.Lock()

    def attach(self, upstream_socket, seconds):
        """From here on the watcher ends this socket when the client leaves or time is up."""
        with self._lock:
            self._upstream_socket = upstream_socket
            self.deadline = self._clock() + seconds
            self.timed_out = False
        self.check()

    def detach(self):
        with self._lock:
            self._upstream_socket = self.deadline = None

    def extend(self, seconds):
        self.deadline = self._clock() + seconds

    def check(self):
        """Raises ClientGone or UpstreamTimeout when that is why a read or write ended."""
        if self.gone:
            raise ClientGone
        if self.timed_out:
            raise UpstreamTimeout

    def client_left(self):
        self.gone = True
        self._end_upstream()
        self.wake.set()

    def expire(self):
        self.timed_out = True
        self._end_upstream()

    def _end_upstream(self):
        with self._lock:
            if self._upstream_socket is None:
                return
            with contextlib.suppress(OSError):    # it may end by itself in this moment
                # Not SSLSocket.shutdown: it would drop the TLS state under a running read.
                socket.socket.shutdown(self._upstream_socket, socket.SHUT_RDWR)


class Watcher:
    """One thread that sees clients leave and upstreams fall silent, while every other thread
    sits in a blocking read.  It costs a request two dictionary operations."""

    def __init__(self, clock=time.monotonic):
        self._clock = clock
        self._exchanges = {}          # id(exchange) -> Exchange
        self._busy = threading.Event()

    def start(self):
        threading.Thread(target=self._run, name='watcher', daemon=True).start()

    @contextlib.contextmanager
    def watching(self, exchange):
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
            exchanges = list(self._exchanges.values())
            if exchanges:
                self.look(exchanges)
                continue
            self._busy.clear()
            if self._exchanges:       # one came between the look and the clearing
                self._busy.set()

    def look(self, exchanges):
        """Ends what has to end among these exchanges."""
        now = self._clock()
        by_socket = {e.client_socket: e for e in exchanges if not e.gone}
        for sock in departed(by_socket):
            by_socket[sock].client_left()
        for exchange in exchanges:
            deadline = exchange.deadline
            if deadline is not None and now > deadline and not exchange.timed_out:
                exchange.expire()


# ==============================================================================
# Client connections
# ==============================================================================
# Requests are read by RFC 9112 and nothing looser: what this proxy and a server behind it
# could read differently is refused (request smuggling), with a 4xx and a closed connection.

METHODS = ('GET', 'POST', 'PUT', 'PATCH', 'DELETE', 'HEAD', 'OPTIONS')
REQUEST_LINE = re.compile(r'([A-Z]{1,16}) ([!-~]+) HTTP/1\.([01])')
#: Field lines as RFC 9110 section 5 has them: no folding, no space before the colon.  The
#: first checks a whole head at once, the second takes it apart.
FIELD_LINES = re.compile(r"(?:\r\n[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\x00-\x08\x0a-\x1f\x7f]*)*")
FIELD = re.compile(r'\r\n([^:\r\n]+):[ \t]*([^\r\n]*)')
CHUNK_LINE = re.compile(rb'([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?')
BARE_LF = re.compile(rb'(?<!\r)\n')
LENGTH = re.compile(r'[0-9]{1,18}')
DOT_SEGMENT = re.compile(r'(?i)(?:^|/|%2f|%5c)(?:\.|%2e){1,2}(?=/|%2f|%5c|$)')


class RequestHead(NamedTuple):
    method: str
    target: str               # path and query, as sent
    minor_version: int        # 1 for HTTP/1.1
    fields: list              # [(name, value), ...] as sent
    headers: dict             # lower-case name -> value; repeated ones joined by ', '

    @property
    def keeps_alive(self):
        options = connection_options(self.headers)
        return 'close' not in options and (self.minor_version == 1 or 'keep-alive' in options)

    @property
    def is_chunked(self):
        return 'transfer-encoding' in self.headers

    @property
    def length(self):
        return int(self.headers.get('content-length', 0))


def connection_options(headers):
    """The names in a Connection field, lower case."""
    return name_list(headers.get('connection', ''))


@functools.lru_cache(maxsize=64)
def name_list(value):
    return frozenset(name.strip().lower() for name in value.split(',')) - {''}


def split_head(data):
    """(first line, [(name, value), ...], whether every field line is well-formed); lines
    that are not are left out."""
    first, end, rest = data.decode('latin-1').partition('\r\n')
    lines = end + rest
    is_well_formed = FIELD_LINES.fullmatch(lines) is not None
    if not is_well_formed:
        lines = ''.join(f'\r\n{line}' for line in rest.split('\r\n')
                        if FIELD_LINES.fullmatch(f'\r\n{line}'))
    return first, [(n, v.rstrip(' \t')) for n, v in FIELD.findall(lines)], is_well_formed


def join_fields(fields):
    """{lower-case name: value}.  Repeated fields are joined, so that a second Host or
    Content-Length makes a value that no strict pattern accepts."""
    headers = {name.lower(): value for name, value in fields}
    if len(headers) < len(fields):
        headers = {}
        for name, value in fields:
            name = name.lower()
            headers[name] = f'{headers[name]}, {value}' if name in headers else value
    return headers


def parse_head(data):
    """The RequestHead in the bytes before the blank line.  Raises BadRequest."""
    first, fields, is_well_formed = split_head(data)
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
    head = RequestHead(method, target, int(minor_version), fields, join_fields(fields))
    check_head(head)
    return head


def check_head(head):
    """Raises BadRequest for what must not be forwarded or cannot be framed for certain."""
    if head.method not in METHODS:
        raise BadRequest(f'The method {head.method} is not supported.', 405)
    path = head.target.partition('?')[0]
    if (not path.startswith('/') or path.startswith('//') or '\\' in head.target
            or '#' in head.target or DOT_SEGMENT.search(path)):
        raise BadRequest('The request target must be a path like /v1/messages.')
    length = head.headers.get('content-length')
    if head.is_chunked:
        coding = head.headers['transfer-encoding']
        if coding.lower() != 'chunked' or length is not None or head.minor_version == 0:
            raise BadRequest('Transfer-Encoding may only be "chunked", without Content-Length.')
    if length is not None and not LENGTH.fullmatch(length):
        raise BadRequest('Content-Length must be one number.')
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

    def __init__(self, sock, clock=time.monotonic):
        self.sock = sock
        self._clock = clock
        self._buffer = bytearray()    # received, not yet used
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        set_kernel_timeouts(sock, CLIENT_READ_S, CLIENT_WRITE_S)

    def read_head(self):
        """The next RequestHead; None when the client closed or stayed idle.  Raises
        BadRequest, ClientGone."""
        if not self._wait_for_request():
            return None
        deadline = self._clock() + CLIENT_HEAD_S
        while True:
            end = self._buffer.find(b'\r\n\r\n')
            if end >= 0:
                break
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise BadRequest(f'The request head is over {MAX_HEAD_BYTES} bytes.', 431)
            if BARE_LF.search(self._buffer):
                raise BadRequest('Lines of a request head must end in CR LF.')
            self._buffer += self._receive(deadline)
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
            if self._buffer:
                return True
            try:
                data = self.sock.recv(RECEIVE_BYTES)
                if not data:
                    return False
                self._buffer += data
            except BlockingIOError:
                if self._clock() > deadline:
                    return False
            except OSError:
                return False

    def _receive(self, deadline):
        """What comes next, at least a byte.  Raises BadRequest after the deadline, ClientGone."""
        try:
            data = self.sock.recv(RECEIVE_BYTES)
        except BlockingIOError as error:
            raise BadRequest('The request did not come in time.', 408) from error
        except OSError as error:
            raise ClientGone from error
        if not data:
            raise ClientGone
        if self._clock() > deadline:
            raise BadRequest('The request did not come in time.', 408)
        return data

    def read_body(self, head):
        """The body, whole.  Raises BadRequest, ClientGone."""
        deadline = self._clock() + CLIENT_BODY_S
        if head.is_chunked:
            return self._read_chunks(deadline)
        # In pieces, joined once: a length alone costs no memory, and a megabyte no second copy.
        pieces = [self._take(head.length)]
        left = head.length - len(pieces[0])
        while left > 0:
            pieces.append(self._receive(deadline))
            left -= len(pieces[-1])
        if left < 0:                  # the beginning of the next request
            self._buffer += pieces[-1][left:]
            pieces[-1] = pieces[-1][:left]
        return b''.join(pieces)

    def _read_chunks(self, deadline):
        body = bytearray()
        for _ in range(MAX_CHUNKS):
            size = self._read_chunk_size(deadline)
            if len(body) + size > MAX_BODY_BYTES:
                raise too_large()
            if not size:
                break
            while len(self._buffer) < size + 2:
                self._buffer += self._receive(deadline)
            if self._buffer[size:size + 2] != b'\r\n':
                raise BadRequest('A chunk of the body does not end where its size says.')
            body += self._take(size, 2)
        else:
            raise BadRequest(f'The body has more than {MAX_CHUNKS} chunks.')
        for _ in range(MAX_FIELDS):               # trailers: read, and not used
            if not self._read_line(deadline):
                return bytes(body)
        raise BadRequest('The body has too many trailers.')

    def _read_chunk_size(self, deadline):
        match = CHUNK_LINE.fullmatch(self._read_line(deadline))
        if not match:
            raise BadRequest('The size of a chunk must be a hexadecimal number.')
        return int(match.group(1), 16)

    def _read_line(self, deadline):
        while b'\r\n' not in self._buffer:
            if len(self._buffer) > MAX_LINE_BYTES:
                raise BadRequest('A line of a chunked body is too long.')
            self._buffer += self._receive(deadline)
        return self._take(self._buffer.find(b'\r\n'), 2)

    def send(self, data):
        try:
            self.sock.sendall(data)
        except OSError as error:
            raise ClientGone from error

    def reset(self):
        """Closes so that the client sees an error, not an end."""
        with contextlib.suppress(OSError):
            linger = struct.pack('ii', 1, 0)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.sock.close()

    def drain(self):
        """Lets a refused client read its answer: closing on unread bytes would reset it."""
        deadline = self._clock() + 1
        with contextlib.suppress(OSError):        # it may leave without waiting
            self.sock.shutdown(socket.SHUT_WR)
            set_kernel_timeouts(self.sock, 1, 1)
            while self.sock.recv(RECEIVE_BYTES) and self._clock() < deadline:
                pass


def too_large():
    message = f'The request body is over {MAX_BODY_BYTES} bytes.'
    return BadRequest(message, 413, 'request_too_large')


REASONS = {**{status.value: status.phrase for status in http.HTTPStatus}, 529: 'Overloaded'}


class ClientResponse:
    """Writes one answer: whole with `send`, or `start`, `write` ..., `finish`.

    The commit is the first byte that leaves: `started` says whether it did.
    """

    def __init__(self, connection, head):       # head None: the request could not be read
        self._connection = connection
        self._has_body = head is None or head.method != 'HEAD'
        self._minor_version = head.minor_version if head else 0
        self.keep_alive = head.keeps_alive if head else False
        self.started = False
        self.status = None
        self._pending = b''           # a head that leaves together with the first piece
        self._chunked = False
        self._is_unframed = False     # only the connection's end tells the client the body's

    def send(self, status, fields, body=b''):
        head = self._head(status, [*fields, ('content-length', len(body))])
        self.started = True
        self._connection.send(head + body if self._has_body else head)

    def start(self, status, fields, length=None):
        """The head of an answer that comes in pieces; `length` of the body when it is known."""
        if length is not None:
            fields = [*fields, ('content-length', length)]
        elif status not in (204, 304):
            self._chunked = self._minor_version == 1
            fields = [*fields, ('transfer-encoding', 'chunked')] if self._chunked else fields
            self._is_unframed = not self._chunked
            self.keep_alive = self.keep_alive and self._chunked
        self._pending = self._head(status, fields)
        self.started = True

    def write(self, data):
        if not (data and self._has_body):
            return
        if self._chunked:
            data = b'%x\r\n%b\r\n' % (len(data), data)
        if self._pending:
            data, self._pending = self._pending + data, b''
        self._connection.send(data)

    def finish(self):
        end = b'0\r\n\r\n' if self._chunked and self._has_body else b''
        if self._pending or end:
            self._connection.send(self._pending + end)
        self._pending = b''

    def abandon(self):
        """Ends an answer that is not complete: the connection closes without the last chunk,
        so that no client takes it for whole."""
        self.keep_alive = False
        if self.started and self._is_unframed:
            self._connection.reset()

    def _head(self, status, fields):
        self.status = status
        lines = [f'HTTP/1.1 {status} {REASONS.get(status, "Unknown")}']
        lines += [f'{name}: {value}' for name, value in fields]
        if not self.keep_alive:
            lines.append('connection: close')
        # Fields come from upstreams that were read strictly and from header_text: no CR, no LF.
        return ('\r\n'.join(lines) + '\r\n\r\n').encode('latin-1', 'replace')


class ClientRequest:
    """A request that is to be answered by an upstream."""

    def __init__(self, head, body, profile_name, access_token=None):
        path, mark, query = head.target.partition('?')
        if path.startswith('/v1/v1/'):            # a base URL that was set with /v1
            path = path[3:]
        self.method, self.path, self.target = head.method, path, path + mark + query
        self.body = RequestBody(body)
        self.has_body = bool(body) or head.is_chunked or 'content-length' in head.headers
        self.profile_name = profile_name
        betas = head.headers.get('anthropic-beta', '').split(',')
        self.betas = [beta.strip() for beta in betas if beta.strip()]
        self.credentials = read_credentials(head.headers, access_token)
        self._fields = head.fields
        self._named_by_connection = connection_options(head.headers)

    @property
    def is_message(self):
        return self.path == MESSAGES_PATH

    @property
    def is_read(self):
        return self.method in ('GET', 'HEAD')

    @functools.cached_property
    def forwarded_head(self):
        """The field lines that every attempt sends, as text."""
        return ''.join([
            f'{name}: {value}\r\n' for name, value in self._fields
            if goes_upstream(name) and name.lower() not in self._named_by_connection])

    @functools.cached_property
    def client_key(self):
        """The client's own credential as a Key; None when it sent none.

        It cools under a name that tells nothing of it: a hash with a salt of this process.
        """
        if not self.credentials:
            return None
        secret = '\n'.join(value for _, value in self.credentials)
        digest = hashlib.blake2b(secret.encode(), key=CLIENT_SALT, digest_size=12).hexdigest()
        return Key(f'client:{digest}', CLIENT_REF, ANTHROPIC, '', CLIENT_REF)


CLIENT_SALT = os.urandom(32)


@functools.lru_cache(maxsize=1024)        # clients send the same names again and again
def goes_upstream(name):
    return name.lower() not in OWN_REQUEST_FIELDS and not name.lower().startswith('x-proxy-')


def read_credentials(headers, access_token=None):
    """[(field, value), ...] of the client's own credential; our access token is none."""
    credentials = []
    for name in ('x-api-key', 'authorization'):
        value = headers.get(name, '')
        if value and not (access_token and presents(value, access_token)):
            credentials.append((name, value))
    return credentials


def presents(value, access_token):
    """Whether a field's value is the access token, bare or as Bearer; in constant time."""
    value = value.encode('latin-1')
    if value[:7].lower() == b'bearer ':
        value = value[7:].strip()
    return hmac.compare_digest(value, access_token.encode())


# ==============================================================================
# Upstream
# ==============================================================================

STATUS_LINE = re.compile(r'HTTP/1\.([01]) ([1-5][0-9][0-9])(?: .*)?')
ODD_LENGTH = re.compile(rb'(?i)\r\n(?:content-length|transfer-encoding)'
                        rb'(?:[^:\r\n]*[ \t]:|:[^\r\n]*\r\n[ \t])')
#: Where programs keep a login that `file:PATH` may name: Claude Code's, the Codex CLI's.
TOKEN_FIELDS = (('claudeAiOauth', 'accessToken'), ('tokens', 'access_token'), ('access_token',),
                ('accessToken',), ('OPENAI_API_KEY',))
#: macOS's own bundle, for Pythons that were installed without one.
SYSTEM_CA_FILE = '/etc/ssl/cert.pem'


class TokenUnavailable(Exception):
    """A token's environment variable or file gives none; the text says which and why."""


class BaseUrl(NamedTuple):
    scheme: str
    host: str
    port: int
    host_field: str           # what goes into Host
    path: str                 # a prefix without a closing slash


@functools.lru_cache(maxsize=64)
def parse_base_url(url):
    parts = urllib.parse.urlsplit(url)
    port = parts.port or (443 if parts.scheme == 'https' else 80)
    path = parts.path.rstrip('/')
    path = path[:-3] if path.endswith('/v1') else path      # our targets begin with /v1
    return BaseUrl(parts.scheme, parts.hostname, port, parts.netloc, path)


def read_token(reference):
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
        value = document
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, str) and value:
            return value, f'file {path} holds a token with a space or control character'
    return '', f'file {path} holds no access token'


class UpstreamRequest(NamedTuple):
    """One attempt as it is sent."""
    base: BaseUrl
    method: str
    head: bytes
    body: bytes


def build_request(request, key, base_url, token, data, betas):
    """The UpstreamRequest of one attempt; `data` and `betas` may differ from the client's."""
    base = parse_base_url(base_url)
    credentials = request.credentials
    if key.id != CLIENT_REF:
        is_oauth = key.oauth or token.startswith('sk-ant-oat')
        credentials = [('authorization', f'Bearer {token}') if is_oauth else ('x-api-key', token)]
        if is_oauth and OAUTH_BETA not in betas:
            betas = [*betas, OAUTH_BETA]
    lines = [f'{request.method} {base.path}{request.target} HTTP/1.1', f'host: {base.host_field}']
    lines += [f'{name}: {value}' for name, value in credentials]
    if betas:
        lines.append('anthropic-beta: ' + ','.join(betas))
    if request.has_body:
        lines.append(f'content-length: {len(data)}')
    lines.append('accept-encoding: identity')
    head = '\r\n'.join(lines) + '\r\n' + request.forwarded_head + '\r\n'
    return UpstreamRequest(base, request.method, head.encode('latin-1'), data)


class UpstreamResponse:
    """An upstream's answer: `status`, `fields`, `headers`, and the body by `read`."""

    def __init__(self, sock, exchange):
        self._sock, self._exchange = sock, exchange
        self._buffer = b''            # received, not yet used
        self._left = 0                # bytes to come of the body or of the current chunk
        self._take = None             # how the body is cut out of what is received
        self.ended = False
        self.keep_alive = False
        self.got_bytes = False
        self.when_closed = None       # takes the socket when it can be used again

    def read_head(self, method):
        """Reads up to the body.  Raises UpstreamCut, ClientGone, UpstreamTimeout."""
        heads = 0
        while True:
            end = self._buffer.find(b'\r\n\r\n')
            if end < 0:
                if len(self._buffer) > MAX_HEAD_BYTES:
                    raise UpstreamCut('the head is too long')
                self._receive()
                continue
            heads += 1
            data, self._buffer = self._buffer[:end], self._buffer[end + 4:]
            self._parse_head(data)
            if self.status >= 200:
                break                 # 100, 102 and 103 only announce the answer
            if self.status == 101 or heads > MAX_INTERIM:
                raise UpstreamCut('it switched protocols, or only announces an answer')
        self._choose_framing(method)

    def _parse_head(self, data):
        # Malformed and folded lines are dropped, but not where they would tell the length.
        first, self.fields, is_well_formed = split_head(data)
        if not is_well_formed and ODD_LENGTH.search(data):
            raise UpstreamCut('the length of its body is unclear')
        match = STATUS_LINE.fullmatch(first)
        if not match or len(self.fields) > MAX_FIELDS:
            raise UpstreamCut('it is no HTTP answer')
        self._is_old = match.group(1) == '0'
        self.status = int(match.group(2))
        self.headers = join_fields(self.fields)

    def _choose_framing(self, method):
        """RFC 9112 section 6.3."""
        options = connection_options(self.headers)
        self.keep_alive = 'close' not in options and (not self._is_old or 'keep-alive' in options)
        length = self.headers.get('content-length')
        coding = self.headers.get('transfer-encoding')
        self.length = None            # of the body, when the head tells
        if method == 'HEAD' or self.status in (204, 304):
            if self.status != 204 and LENGTH.fullmatch(length or ''):
                self.length = int(length)
            self.ended = True
        elif coding is not None:
            if coding.lower() != 'chunked':
                raise UpstreamCut('its transfer coding is unknown')
            self._take, self._at_chunk_end = self._take_chunks, False
            self._in_trailers, self._trailers = False, 0
        elif length is not None:
            if not LENGTH.fullmatch(length):
                raise UpstreamCut('its length is no number')
            self._take, self._left = self._take_counted, int(length)
            self.length, self.ended = self._left, not self._left
        else:
            self._take, self.keep_alive = self._take_rest, False

    def read(self):
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

    def read_all(self, limit):
        """The rest of the body, at most about `limit` bytes of it."""
        body = bytearray()
        while len(body) < limit:
            piece = self.read()
            if not piece:
                break
            body += piece
        return bytes(body)

    def _receive(self):
        try:
            data = self._sock.recv(RECEIVE_BYTES)
        except OSError as error:
            self._exchange.check()
            raise UpstreamCut(error_reason(error)) from error
        if not data:
            self._exchange.check()
            raise UpstreamClosed('it closed the connection')
        self.got_bytes = True
        self._exchange.extend(STREAM_IDLE_S)
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
        """The body bytes of all chunks received so far, joined."""
        data, position, pieces = self._buffer, 0, []
        while not self.ended:
            if self._left:
                piece = data[position:position + self._left]
                pieces.append(piece)
                position += len(piece)
                self._left -= len(piece)
                self._at_chunk_end = not self._left
                if self._left:
                    break
            end = data.find(b'\r\n', position)
            if end < 0:
                if len(data) - position > MAX_LINE_BYTES:
                    raise UpstreamCut('a chunk is malformed')
                break
            line, position = data[position:end], end + 2
            self._note_chunk_line(line)
        self._buffer = data[position:]
        return pieces[0] if len(pieces) == 1 else b''.join(pieces)

    def _note_chunk_line(self, line):
        """A line between chunks: the end of one, the size of the next, or a trailer."""
        if self._at_chunk_end:
            if line:
                raise UpstreamCut('a chunk is longer than its size')
            self._at_chunk_end = False
        elif self._in_trailers:
            self.ended = not line
            self._trailers += 1
            if self._trailers > MAX_FIELDS:
                raise UpstreamCut('its trailers have no end')
        else:
            match = CHUNK_LINE.fullmatch(line)
            if not match:
                raise UpstreamCut('a chunk has no size')
            self._left = int(match.group(1), 16)
            self._in_trailers = not self._left

    def close(self):
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
        self._context = None
        self._context_lock = threading.Lock()

    def open(self, wanted, exchange, first_byte_s):
        """The UpstreamResponse to an UpstreamRequest, its head read; `close` ends it.

        A reused connection that dies before any byte of the answer is replaced silently.
        Raises UpstreamUnreachable, UpstreamTimeout, ClientGone.
        """
        may_reuse = True
        while True:
            exchange.check()
            sock = self._take_idle(wanted.base) if may_reuse else None
            is_reused = sock is not None
            if not is_reused:
                sock = self._connect(wanted.base)
            response = UpstreamResponse(sock, exchange)
            try:
                exchange.attach(sock, first_byte_s)
                was_sent = send_request(sock, wanted)
                response.read_head(wanted.method)
                response.keep_alive = response.keep_alive and was_sent
                response.when_closed = functools.partial(self._put_back, wanted.base)
                return response
            except (UpstreamCut, OSError) as error:
                exchange.detach()
                sock.close()
                exchange.check()
                if is_reused and not response.got_bytes:
                    may_reuse = False # it had been closed while it was idle: nothing was lost
                    continue
                reason = str(error) if isinstance(error, UpstreamCut) else error_reason(error)
                raise UpstreamUnreachable(f'{wanted.base.host}: {reason}', True) from error
            except BaseException:
                exchange.detach()
                sock.close()
                raise

    def _take_idle(self, base):
        """The newest idle connection that is still good, or None."""
        while True:
            with self._lock:
                idle = self._idle.get(base[:3])
                if not idle:
                    return None
                sock, since = idle.pop()
            # Bytes on an idle connection are its end, or an answer that nobody asked for.
            if 0 <= self._now() - since <= POOL_IDLE_S and not readable([sock]):
                return sock
            sock.close()

    def _put_back(self, base, sock):
        with self._lock:
            idle = self._idle.setdefault(base[:3], [])
            idle.append((sock, self._now()))
            surplus = idle.pop(0)[0] if len(idle) > POOL_SIZE else None
        if surplus:
            surplus.close()

    def close_idle(self, for_s=0):
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
        host, port = proxy[:2] if proxy else (base.host, base.port)
        if base.scheme == 'https':
            connection = http.client.HTTPSConnection(host, port, timeout=CONNECT_S,
                                                     context=self.tls_context())
        else:
            connection = http.client.HTTPConnection(host, port, timeout=CONNECT_S)
        if proxy:
            connection.set_tunnel(base.host, base.port, proxy[2])
        try:
            connection.connect()
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            connection.close()
            via = f' by way of the proxy {host}:{port}' if proxy else ''
            raise UpstreamUnreachable(f'{base.host}{via}: {error_reason(error)}', False) from error
        sock = connection.sock
        sock.settimeout(None)         # the watcher keeps the time
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
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


def send_request(sock, wanted):
    """One send for head and body where that saves a packet.

    An upstream may answer a large body before it has read it (a 429, a 413): then the rest is
    not sent, and the connection not used again.  Whether all was sent.
    """
    if len(wanted.body) <= JOIN_BYTES:
        sock.sendall(wanted.head + wanted.body)
        return True
    sock.sendall(wanted.head)
    with memoryview(wanted.body) as view:
        for start in range(0, len(view), SEND_BYTES):
            if not wait_to_send(sock):
                return False
            try:
                sock.sendall(view[start:start + SEND_BYTES])
            except (BrokenPipeError, ConnectionResetError):
                if not readable([sock]):
                    raise
                return False
    return True


def wait_to_send(sock):
    """Waits until a socket takes bytes; False when it has some itself, or its end."""
    if not hasattr(select, 'poll'):               # Windows
        received, _, _ = select.select([sock], [sock], [])
        return not received
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN | select.POLLOUT)
    return all(not event & ~select.POLLOUT for _, event in poll.poll())


def outbound_proxy(base):
    """(host, port, tunnel headers) from HTTPS_PROXY for an https upstream, or None.

    NO_PROXY is honoured; this machine is never reached by way of a proxy.
    """
    names = ('https_proxy', 'HTTPS_PROXY')
    if base.scheme != 'https' or not any(os.environ.get(name) for name in names):
        return None
    import urllib.request
    url = urllib.request.getproxies_environment().get('https')
    if not url or is_loopback(base.host) or urllib.request.proxy_bypass_environment(base.host):
        return None
    try:
        parts = urllib.parse.urlsplit(url if '://' in url else f'http://{url}')
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        host = None
    if not host or parts.scheme != 'http':
        raise UpstreamUnreachable('HTTPS_PROXY must be a URL like http://host:port', False)
    headers = {}
    if parts.username is not None:
        user = urllib.parse.unquote(f'{parts.username}:{parts.password or ""}')
        headers['Proxy-Authorization'] = 'Basic ' + base64.b64encode(user.encode()).decode()
    return host, port, headers


def is_loopback(host):
    return host == 'localhost' or host == '::1' or host.startswith('127.')


# ==============================================================================
# Failover
# ==============================================================================
# One request from its plan to its answer.  Policy stands in RULES; here it is carried out.

class Reply(NamedTuple):
    """What came of one attempt: an answer to relay (`upstream`), or one read to its end."""
    outcome: Outcome
    fields: list = []
    body: bytes = b''
    upstream: UpstreamResponse | None = None
    events: MessageStream | None = None    # of a stream of /v1/messages
    held: bytes = b''                         # its first bytes, not passed on yet


class Failure(NamedTuple):
    """An attempt that did not answer in this round: tried (`reply`), or skipped as it cools."""
    attempt: Attempt
    outcome: Outcome
    reply: Reply | None
    rested: bool              # it cools now


def new_request_id():
    return f'req_proxy_{random.getrandbits(96):024x}'


class Serving:
    """One request on its way: what was planned and tried, and what is told of it at the end."""

    def __init__(self, request, response, exchange, config, clock):
        self.request, self.response, self.exchange = request, response, exchange
        self.config = config
        self.clock = clock
        self.started = clock()
        self.request_id = new_request_id()    # the upstream's, once its answer is relayed
        self.ticket = None
        self.queue_deadline = None
        self.attempts = []            # [{'key': 'work', 'model': ..., 'status': 429, ...}, ...]
        self.queued_s = 0.0
        self.repairs = {}             # model -> [(name, subject), ...] that this request needs
        self.secrets = {value.split(' ')[-1] for _, value in request.credentials}
        self.next_ping = None         # when a held stream is told that it is not forgotten
        self.record = {'outcome': 'failed'}   # what the log line says beside the attempts
        self.begin_round([])

    def begin_round(self, plan):
        self.plan = plan
        self.failures = []            # [Failure, ...]
        self.counts = {}              # (model, rule name) -> answers
        self.given_up = set()         # models
        self.resets = {}              # base URL -> connections lost before an answer
        self.dead_ends = set()        # base URLs that another key would not reach either
        self.stopped = False

    @property
    def was_queued(self):
        return self.queued_s >= 0.01          # not for having asked how long it would be

    def slot(self, attempt):
        """What this attempt cools by: limits on models are those of /v1/messages alone."""
        return attempt.key.ref, attempt.model if self.request.is_message else None

    def without_secrets(self, text):
        """Text of an upstream, which may quote the credential that it was sent."""
        for secret in self.secrets:
            if secret and secret in text:
                text = text.replace(secret, mask_token(secret))
        return text

    def note(self, attempt, outcome, started):
        """Adds an attempt to the trail."""
        self.attempts.append({'key': attempt.key.id, 'model': attempt.model,
                              'status': outcome.status, 'result': outcome.rule.name,
                              'ms': round((self.clock() - started) * 1000)})

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
        if self.was_queued:
            fields.append(('x-proxy-queued', math.ceil(self.queued_s)))
        if self.attempts:
            trail = ','.join(f'{a["key"]}={a["status"] or a["result"]}'
                             for a in self.attempts[-MAX_TOLD_ATTEMPTS:])
            fields.append(('x-proxy-attempts', trail))
        return fields


def end_to_end_fields(response_fields, headers):
    """An upstream's header fields as the client gets them."""
    named_by_connection = connection_options(headers)
    return [field for field in response_fields
            if goes_to_client(field[0]) and field[0].lower() not in named_by_connection]


@functools.lru_cache(maxsize=1024)
def goes_to_client(name):
    """Neither fields of the connection, nor any that would let a web page read the answer."""
    name = name.lower()
    return name not in OWN_RESPONSE_FIELDS and not name.startswith(('access-control-', 'x-proxy-'))


class Failover:
    """Serves requests: plans, tries, queues, relays."""

    def __init__(self, store, cooldowns, upstream, journal, clock=time.monotonic, now=time.time,
                 wait=threading.Event.wait, jitter=random.uniform):
        self._store, self.cooldowns, self._upstream = store, cooldowns, upstream
        self._journal = journal
        self._clock, self._now, self._wait, self._jitter = clock, now, wait, jitter
        self._repairs = {}            # model -> ((name, subject), ...) learnt from its 400s
        self.stopping = False

    def serve(self, request, response, exchange):
        """Answers one request, whatever happens, and tells the journal."""
        serving = Serving(request, response, exchange, self._store.current, self._clock)
        try:
            self._replan(serving)
            while not self._try_all(serving):
                if serving.stopped or not self._await_turn(serving):
                    self._send_failure(serving)
                    break
        except ClientGone:
            response.abandon()
            serving.record['outcome'] = 'client_gone'
        finally:
            self._leave_queue(serving)
            self._journal.finished(self._finished_record(serving))

    def _replan(self, serving):
        """A new round, on the configuration that is in force now."""
        serving.config = config = self._store.current
        request, profile = serving.request, config.profiles.get(serving.request.profile_name)
        if profile is None:
            serving.begin_round([])
            return
        model = request.body.model if request.has_body else None
        models = [model]
        if model and request.is_message:
            models = model_chain(config.model_fallback, model)
        client_key = request.client_key if uses_clients_own(config, profile) else None
        plan = plan_attempts(config, profile, models, client_key)
        if not request.is_message:
            # Their own limits are not those of messages: a cooling key is only second choice.
            plan.sort(key=lambda a: self.cooldowns.blocking((a.key.ref, None)) is not None)
            if model is None and not request.is_read:
                plan = plan[:1]       # what it makes belongs to one key's organization
        serving.begin_round(plan)

    def _try_all(self, serving):
        """Goes through the plan once; whether the client was answered."""
        for index, attempt in enumerate(serving.plan):
            if serving.stopped or attempt.model in serving.given_up:
                continue
            if self._base_url(serving, attempt) in serving.dead_ends:
                continue
            cooling = self._blocking(serving, attempt)
            if cooling and (serving.request.is_message or not cooling.outcome.rule.waits):
                serving.failures.append(Failure(attempt, cooling.outcome, None, rested=True))
                continue
            if serving.ticket:
                self.cooldowns.try_slot(serving.ticket, serving.slot(attempt))
            if self._try(serving, attempt, self._is_alone(serving, attempt, index)):
                return True
        return False

    def _base_url(self, serving, attempt):
        return attempt.key.base_url or serving.config.anthropic_base_url

    def _is_alone(self, serving, attempt, index):
        """Whether no later attempt with this model could be made now."""
        return not any(other.model == attempt.model and not self._blocking(serving, other)
                       for other in serving.plan[index + 1:])

    def _blocking(self, serving, attempt):
        """What keeps an attempt from being made now, or None."""
        return self.cooldowns.blocking(serving.slot(attempt), serving.ticket)

    def _try(self, serving, attempt, is_alone):
        """One attempt, with its repeats and repairs; whether the client was answered."""
        was_repeated = False
        for _ in range(MAX_REPAIRS + 2):
            started = self._clock()
            reply = self._open(serving, attempt)
            serving.note(attempt, reply.outcome, started)
            rule = reply.outcome.rule
            if rule.step is Step.REPAIR and self._learn_repair(serving, attempt, reply.outcome):
                continue
            if rule.step in (Step.RELAY, Step.REPAIR):
                self._relay(serving, attempt, reply)
                return True
            if self._tries_again(serving, attempt, rule, is_alone) and not was_repeated:
                was_repeated = True
                self._pause(serving)
                continue
            break
        self._give_up_attempt(serving, attempt, reply)
        return False

    def _tries_again(self, serving, attempt, rule, is_alone):
        """Counts this answer, and says whether the same key is tried once more."""
        counted = (attempt.model, rule.name)
        serving.counts[counted] = serving.counts.get(counted, 0) + 1
        if serving.counts[counted] >= rule.tries:
            serving.given_up.add(attempt.model)
            return False
        return rule.again is Again.FIRST or rule.again is Again.ALONE and is_alone

    def _give_up_attempt(self, serving, attempt, reply):
        outcome, rule = reply.outcome, reply.outcome.rule
        serving.stopped = serving.stopped or rule.step is Step.STOP
        if not rule.other_models:
            serving.given_up.update(a.model for a in serving.plan if a.model != attempt.model)
        self._note_dead_end(serving, attempt, rule)
        rested = self._cool(serving, attempt, outcome) > 0
        serving.failures.append(Failure(attempt, outcome, reply, rested))

    def _cool(self, serving, attempt, outcome):
        """Rests what the outcome says; the seconds, 0 for nothing."""
        rule, key, (_, model) = outcome.rule, attempt.key, serving.slot(attempt)
        in_force = self._store.current.keys.get(key.ref)
        if rule.scope is Scope.PAIR and model is None or in_force and in_force.token != key.token:
            return 0          # not about messages; or of a token that was replaced meanwhile
        seconds = self.cooldowns.cool(key, model, outcome, serving.config.cooldown_ms / 1000)
        if seconds:
            self._journal.log.write(
                'error' if rule.attention else 'warn', 'cooldown', key=key.id,
                model=None if rule.scope is Scope.KEY else model, reason=rule.name,
                status=outcome.status, message=outcome.message[:300],
                cooldown_ms=round(seconds * 1000))
        return seconds

    def _note_dead_end(self, serving, attempt, rule):
        """Another key of an unreachable host would fail alike; a reset gets one more try."""
        base_url = self._base_url(serving, attempt)
        if rule is RESET:
            serving.resets[base_url] = serving.resets.get(base_url, 0) + 1
        if rule is UNREACHABLE or serving.resets.get(base_url, 0) > 1:
            serving.dead_ends.add(base_url)

    def _pause(self, serving):
        """0.5 to 1 s before the same key again, so that many clients do not come at once."""
        exchange, end = serving.exchange, self._clock() + self._jitter(0.5, 1.0)
        while self._clock() < end:    # the queue's news wake it too
            exchange.wake.clear()
            exchange.check()
            self._wait(exchange.wake, end - self._clock())
        exchange.check()

    # -- one attempt -----------------------------------------------------------

    def _open(self, serving, attempt):
        """Sends one attempt; its Reply, with the answer still open where it is to be relayed."""
        request = serving.request
        try:
            wanted = self._build(serving, attempt)
            first_byte_s = STREAM_FIRST_BYTE_S if request.body.seems_streamed else FIRST_BYTE_S
            upstream = self._upstream.open(wanted, serving.exchange, first_byte_s)
            return self._read_reply(serving, attempt, upstream)
        except TokenUnavailable as error:
            return Reply(Outcome(NO_TOKEN, 0, str(error), None))
        except UpstreamUnreachable as error:
            rule = RESET if error.connected else UNREACHABLE
            return Reply(Outcome(rule, 0, error.reason, None))
        except UpstreamTimeout:
            return Reply(Outcome(TIMED_OUT, 0, 'no answer in time', None))

    def _build(self, serving, attempt):
        request, betas = serving.request, serving.request.betas
        data = request.body.data
        if request.is_message:
            data = drop_unsigned_thinking(data)
            data = RequestBody(data).for_model(attempt.model)
            repairs = self._repairs_for(serving, attempt.model)
            if repairs:
                data, betas = apply_repairs(repairs, data, betas)
        token = '' if attempt.key.id == CLIENT_REF else read_token(attempt.key.token)
        serving.secrets.add(token)
        return build_request(request, attempt.key, self._base_url(serving, attempt), token, data,
                             betas)

    def _repairs_for(self, serving, model):
        """What this request needs on this model: what its 400s said, now and, for a fallback
        model, earlier."""
        if model not in serving.repairs:
            learnt = self._repairs.get(model, ()) if model != serving.request.body.model else ()
            serving.repairs[model] = list(learnt)
        return serving.repairs[model]

    def _learn_repair(self, serving, attempt, outcome):
        """Notes what a 400 complains of; False when that was left out already."""
        model, repair = attempt.model, find_repair(outcome.message)
        if not serving.request.is_message:
            return False
        if repair in serving.repairs[model] or len(serving.repairs[model]) >= MAX_REPAIRS:
            return False
        serving.repairs[model].append(repair)
        # A signature is about this conversation, not about the model.
        self._repairs[model] = tuple(r for r in serving.repairs[model] if r[0] != 'signature')
        self._journal.log.info('repair', model=model, repair=repair[0], subject=repair[1])
        return True

    def _read_reply(self, serving, attempt, upstream):
        """Reads as much of an answer as it takes to know what it means."""
        reply = None
        try:
            headers = upstream.headers
            is_stream = (headers.get('content-type', '').lower().startswith('text/event-stream')
                         and 'content-encoding' not in headers)
            if upstream.status >= 300:
                reply = self._read_refusal(serving, attempt, upstream)
            elif is_stream and serving.request.is_message:
                reply = self._read_opening(serving, attempt, upstream)
            else:
                reply = self._read_beginning(serving, attempt, upstream)
            return reply
        finally:
            if reply is None or reply.upstream is None:
                upstream.close()

    def _classify(self, serving, attempt, upstream, status=None, error=('', '')):
        request, (type, message) = serving.request, error
        return classify(Answer(
            status or upstream.status, upstream.headers, type, serving.without_secrets(message),
            self._now(), request.path, attempt.model, attempt.model != request.body.model))

    def _read_refusal(self, serving, attempt, upstream):
        try:
            body = upstream.read_all(MAX_ERROR_BODY_BYTES)
        except UpstreamCut as error:
            outcome = self._classify(serving, attempt, upstream)
            # Status and fields are often clear enough; what would be relayed is not there.
            return Reply(outcome) if outcome.rule.step is Step.NEXT_KEY else self._cut_reply(error)
        outcome = self._classify(serving, attempt, upstream, error=read_error(body))
        return Reply(outcome, upstream.fields, body)

    def _read_beginning(self, serving, attempt, upstream):
        """Waits for the first piece of a body: until then another key may still answer."""
        try:
            held = upstream.read()
        except UpstreamCut as error:
            return self._cut_reply(error)
        outcome = self._classify(serving, attempt, upstream)
        return Reply(outcome, upstream.fields, upstream=upstream, held=held)

    def _read_opening(self, serving, attempt, upstream):
        """Holds a stream back until its first content: an error before that is no answer."""
        events, held = MessageStream(), b''
        while not events.opened_by and len(held) <= MAX_EVENT_BYTES:
            try:
                piece = upstream.read()
            except UpstreamCut as error:
                return self._cut_reply(error)
            if not piece:
                return self._cut_reply('the stream ended before its first content')
            held += events.feed(piece)
        if events.opened_by != 'error':
            outcome = self._classify(serving, attempt, upstream)
            return Reply(outcome, upstream.fields, upstream=upstream, events=events, held=held)
        type, message = read_error(dump_body({'error': events.error}))
        status = STATUS_OF_ERROR.get(type, 500)
        outcome = self._classify(serving, attempt, upstream, status, (type, message))
        fields = [(n, v) for n, v in upstream.fields if n.lower() != 'content-type']
        return Reply(outcome, [*fields, JSON_TYPE], error_json(type, message))

    def _cut_reply(self, error):
        return Reply(Outcome(RESET, 0, f'the answer broke off: {error}', None))

    # -- the answer ------------------------------------------------------------

    def _relay(self, serving, attempt, reply):
        """Gives the client an upstream's answer: the commit."""
        if 200 <= reply.outcome.status < 300:
            self.cooldowns.succeeded(*serving.slot(attempt))
        self._leave_queue(serving)
        asked = serving.request.body.model
        serving.record = {
            'outcome': 'answered' if reply.outcome.status < 400 else 'refused',
            'key': attempt.key.id, 'provider': attempt.key.provider,
            'upstream_model': attempt.model, 'ttfb_ms': self._elapsed_ms(serving)}
        if attempt.model != asked:
            serving.record['fallback'] = f'{asked} -> {attempt.model}'
        upstream = reply.upstream
        headers = upstream.headers if upstream else join_fields(reply.fields)
        serving.request_id = headers.get('request-id', serving.request_id)
        fields = end_to_end_fields(reply.fields, headers) + serving.proxy_fields(attempt)
        if upstream is None:
            return self._send_whole(serving, reply.outcome.status, fields, reply.body)
        try:
            relay = self._relay_stream if reply.events else self._relay_body
            relay(serving, reply, fields)
        finally:
            upstream.close()

    def _send_whole(self, serving, status, fields, body):
        """An answer that is at hand; to a stream that was held open it is an `error` event."""
        if not serving.response.started:
            return serving.response.send(status, fields, body)
        type, message = read_error(body)
        serving.response.write(error_event(type.split(' ')[0] or 'api_error', message))
        serving.response.finish()

    def _relay_body(self, serving, reply, fields):
        """Any answer but a stream of messages, piece by piece as it comes."""
        response, upstream = serving.response, reply.upstream
        if response.started:
            message = f'{PROGRAM}: a stream was asked for, and the upstream sent none.'
            serving.record.update(outcome='failed', error=message)
            return self._send_whole(serving, 502, [], error_json('api_error', message))
        response.start(upstream.status, fields, upstream.length)
        piece, tail = reply.held, b''
        try:
            while piece:
                response.write(piece)
                tail = (tail + piece)[-2048:] if len(piece) < 2048 else piece[-2048:]
                piece = upstream.read()
            response.finish()
        except (UpstreamCut, UpstreamTimeout) as error:
            response.abandon()
            serving.record.update(outcome='failed', error=f'cut after the commit: {error}')
        serving.record.update(read_usage(tail))

    def _relay_stream(self, serving, reply, fields):
        """Whole events as they arrive, unchanged; an end that is none is told as an error."""
        response, upstream, events = serving.response, reply.upstream, reply.events
        serving.record['stream'] = True
        if not response.started:
            response.start(upstream.status, fields)
        response.write(reply.held)
        problem = "the upstream's stream ended before the message did"
        try:
            while True:
                piece = upstream.read()
                if not piece:
                    break
                response.write(events.feed(piece))
            response.write(events.last())
        except UpstreamCut as error:
            problem = f"the upstream's stream broke off: {error}"
        except UpstreamTimeout:
            problem = f'the upstream sent nothing for {STREAM_IDLE_S} s'
        serving.record.update({name: events.usage[name] for name in USAGE_FIELDS
                               if name in events.usage})
        self._end_stream(serving, events, problem)

    def _end_stream(self, serving, events, problem):
        """The end of a stream after its commit; `problem` is what it is when the message is not
        whole.  A second answer is never spliced in."""
        response = serving.response
        if events.error is not None:
            message = serving.without_secrets(str(events.error.get('message')))
            serving.record.update(outcome='failed', error=redact(message[:300]))
        elif events.stop_reason and not events.stopped:
            response.write(event_bytes({'type': 'message_stop'}))
        elif not events.stopped:
            serving.record.update(outcome='failed', error=problem)
            response.write(error_event('api_error', f'{PROGRAM}: {problem}.'))
            return response.abandon()
        return response.finish()

    # -- the queue -------------------------------------------------------------

    def _await_turn(self, serving):
        """Waits until an attempt may be made; False when that is not to be hoped for in time."""
        queue_wait_s = serving.config.queue_wait_ms / 1000
        is_queued = serving.request.is_message and serving.plan and queue_wait_s > 0
        if not is_queued or not self._all_rest(serving):
            return False
        entered = self._clock()
        if serving.ticket is None:
            serving.queue_deadline = entered + queue_wait_s
            serving.next_ping = entered + PING_S
            serving.ticket = self.cooldowns.join_queue(serving.exchange.wake)
        self.cooldowns.await_slots(serving.ticket, map(serving.slot, serving.plan))
        try:
            is_my_turn = self._wait_in_queue(serving)
        finally:
            serving.queued_s += self._clock() - entered
        if is_my_turn:
            self._replan(serving)
        return is_my_turn

    def _all_rest(self, serving):
        """Whether every attempt cools, or did when its turn came: then it is worth waiting."""
        rested = {failure.attempt for failure in serving.failures if failure.rested}
        return all(attempt in rested or self._blocking(serving, attempt)
                   for attempt in serving.plan)

    def _wait_in_queue(self, serving):
        exchange = serving.exchange
        while True:
            seconds, is_behind = self.cooldowns.seconds_to_turn(serving.ticket)
            exchange.check()          # after the wake-up call was cleared, like what follows
            if self.stopping:
                return False
            left = serving.queue_deadline - self._clock()
            if left <= 0 or seconds > left and not is_behind:
                return False
            if seconds == 0 or self._store.current is not serving.config:
                return True           # a changed configuration is worth another look
            until_ping = max(0.0, serving.next_ping - self._clock())
            self._wait(exchange.wake, min(left, until_ping, seconds))
            exchange.check()
            if self._clock() >= serving.next_ping:
                self._hold_open(serving)
                serving.next_ping += PING_S

    def _hold_open(self, serving):
        """Keeps a stream's client patient: it takes pings before the first event."""
        response = serving.response
        if not serving.request.body.is_streamed:
            return
        if not response.started:
            response.start(200, [('content-type', 'text/event-stream; charset=utf-8'),
                                 ('cache-control', 'no-cache'),
                                 ('request-id', serving.request_id),
                                 *serving.proxy_fields()])
        response.write(PING_EVENT)

    def _leave_queue(self, serving):
        if serving.ticket:
            self.cooldowns.leave_queue(serving.ticket)
            serving.ticket = None

    # -- the final failure -----------------------------------------------------

    def _send_failure(self, serving):
        final = final_failure(self._failed_attempts(serving), serving, self._now)
        serving.record.update(outcome='failed', error=final.message[:500])
        if final.key:
            serving.record['key'] = final.key.id
        self._send_whole(serving, final.status, final.fields, final.body)

    def _failed_attempts(self, serving):
        """[(Failure, seconds until its slot comes back, or None), ...]"""
        failed = []
        for failure in serving.failures:
            cooling = self._blocking(serving, failure.attempt)
            failed.append((failure, self.cooldowns.remaining_s(cooling) if cooling else None))
        return failed

    # -- what is told ----------------------------------------------------------

    def _elapsed_ms(self, serving):
        return round((self._clock() - serving.started) * 1000)

    def _finished_record(self, serving):
        request = serving.request
        record = {
            'id': serving.request_id, 'profile': request.profile_name, 'method': request.method,
            'path': request.path[:300],
            'model': (request.body.model or '')[:300] or None if request.has_body else None,
            'status': serving.response.status, **serving.record, 'attempts': serving.attempts,
            'duration_ms': self._elapsed_ms(serving)}
        if serving.was_queued:
            record['queued_ms'] = round(serving.queued_s * 1000)
        return record


USAGE_FIELDS = ('input_tokens', 'output_tokens', 'cache_read_input_tokens',
                'cache_creation_input_tokens')
USAGE_COUNT = re.compile(rb'"(%b)"\s*:\s*(\d{1,12})' % '|'.join(USAGE_FIELDS).encode())
JSON_TYPE = ('content-type', 'application/json')


def read_usage(tail):
    """{'input_tokens': 10, ...} from the end of a plain answer's bytes, as far as it is there."""
    start = tail.rfind(b'"usage"')
    if start < 0:
        return {}
    return {name.decode(): int(count) for name, count in USAGE_COUNT.findall(tail, start)}


class FinalFailure(NamedTuple):
    status: int
    fields: list
    body: bytes
    message: str
    key: Key | None = None


#: What decides when the attempts failed differently: the first of these that one of them has.
FINAL_ORDER = (Final.TIMEOUT, Final.LIMITED, Final.OVERLOADED, Final.SERVER, Final.BLOCKED,
               Final.UNAUTHORIZED, Final.VERBATIM)
FINAL_STATUS = {
    Final.TIMEOUT: (504, 'timeout_error'), Final.LIMITED: (429, 'rate_limit_error'),
    Final.OVERLOADED: (529, 'overloaded_error'), Final.SERVER: (502, 'api_error'),
    Final.BLOCKED: (502, 'api_error'), Final.UNAUTHORIZED: (502, 'api_error')}
#: Nothing that a client could wait for changes these.
HOPELESS = (Final.BLOCKED, Final.UNAUTHORIZED, Final.VERBATIM)


def final_failure(failed, serving, now):
    """The answer when nothing is left: Anthropic's shape, what was tried, when to come back.

    `failed` is [(Failure, seconds until its slot comes back, or None), ...].
    """
    if not failed:
        return no_plan_failure(serving)
    finals = {failure.outcome.rule.final for failure, _ in failed}
    final = next(final for final in FINAL_ORDER if final in finals)
    keys = {failure.attempt.key.ref: failure.attempt.key for failure, _ in failed}
    tried = [failure for failure, _ in failed if failure.reply and failure.reply.body]
    is_clients_own = all(key.id == CLIENT_REF for key in keys.values())
    if tried and (final is Final.VERBATIM or is_clients_own and final in HOPELESS):
        return verbatim_failure(tried[0], serving, is_clients_own)
    if final is Final.UNAUTHORIZED and len(keys) == 1:
        return own_failure(401, 'authentication_error', failed, serving, final, now)
    if final is Final.VERBATIM:       # all of them were skipped: say what they last said
        status = failed[0][0].outcome.status
        type = next((t for t, s in STATUS_OF_ERROR.items() if s == status), 'api_error')
        return own_failure(status, type, failed, serving, final, now)
    return own_failure(*FINAL_STATUS[final], failed, serving, final, now)


def no_plan_failure(serving):
    if any(key.provider == ANTHROPIC for key in serving.config.keys.values()):
        message = f'{PROGRAM}: the profile {serving.request.profile_name} is gone.'
    else:
        message = (f'{PROGRAM}: no Anthropic key is configured and the request carries none. '
                   f'Add one: {RUN} add-key')
    fields = [JSON_TYPE, ('request-id', serving.request_id), ('x-should-retry', 'false')]
    return FinalFailure(401, fields, error_json('authentication_error', message), message)


def verbatim_failure(failure, serving, is_clients_own):
    """An upstream's own answer.  A client whose own login was refused mends it by itself."""
    fields = end_to_end_fields(failure.reply.fields, join_fields(failure.reply.fields))
    fields += serving.proxy_fields(failure.attempt)
    has_advice = any(name.lower() == 'x-should-retry' for name, _ in fields)
    if not (is_clients_own or has_advice or failure.outcome.status == 429):
        fields.append(('x-should-retry', 'false'))
    return FinalFailure(failure.outcome.status, fields, failure.reply.body,
                        failure.outcome.message, failure.attempt.key)


def earliest_return(failed):
    """(seconds, Failure) of the key that may be tried again first; (None, None): only a
    person can help.  A key that failed in passing and does not rest is back at once."""
    returns = [(seconds or 0, failure) for failure, seconds in failed
               if failure.outcome.rule.waits
               and (seconds is not None or failure.outcome.rule.final not in HOPELESS)]
    return min(returns, key=lambda pair: pair[0], default=(None, None))


def own_failure(status, type, failed, serving, final, now):
    earliest_s, earliest = earliest_return(failed)
    message = failure_message(failed, final)
    fields = [JSON_TYPE, ('request-id', serving.request_id), *serving.proxy_fields()]
    is_soon = earliest is not None and earliest_s <= CLIENT_PATIENCE_S
    if earliest and final not in HOPELESS and (earliest_s or final is not Final.SERVER):
        back_at = time.strftime('%H:%M:%S', time.localtime(now() + earliest_s))
        message += (f' Earliest back: {earliest.attempt.key.id} in {format_duration(earliest_s)}'
                    f' ({back_at}).')
        fields.append(('retry-after', max(1, math.ceil(earliest_s))))
    if final in HOPELESS or final is Final.LIMITED and not is_soon:
        fields.append(('x-should-retry', 'false'))
    fields += [(name, value) for failure, _ in failed[-1:] if failure.reply
               for name, value in failure.reply.fields
               if name.lower().startswith('anthropic-ratelimit-')]
    return FinalFailure(status, fields, error_json(type, message), message)


def failure_message(failed, final):
    """One sentence naming each key and model, and what it answered; equal answers together."""
    groups = {}       # what was said -> ['work with claude-opus-5-5 (back in 20 s)', ...]
    for failure, seconds in failed:
        outcome, attempt = failure.outcome, failure.attempt
        said = f'{outcome.status or ""} {outcome.rule.name}'.strip()
        if outcome.message:
            said += f', "{printable(outcome.message[:200])}"'
        model = f' with {printable(attempt.model[:100])}' if attempt.model else ''
        back = f' (back in {format_duration(seconds)})' if seconds else ''
        groups.setdefault(said, []).append(f'{attempt.key.id}{model}{back}')
    told = '; '.join(f'{", ".join(who)}: {said}' for said, who in groups.items())
    lead = {Final.LIMITED: 'every key is exhausted', Final.BLOCKED: 'no key may be used',
            Final.UNAUTHORIZED: 'no key is accepted', Final.OVERLOADED: 'the model is overloaded',
            Final.TIMEOUT: 'the upstream gave no answer'}.get(final, 'the upstream failed')
    return f'{PROGRAM}: {lead}. {told}.'


# ==============================================================================
# HTTP server
# ==============================================================================
# Loopback is no boundary: any web page can send requests here.  So every request passes the
# guard first, whatever its path.

class Call(NamedTuple):
    """One request to a route."""
    app: object               # the App
    head: RequestHead
    body: bytes
    response: ClientResponse
    profile_name: str
    connection: ClientConnection

    def send_json(self, status, value):
        data = json.dumps(value, indent=2).encode() + b'\n'
        self.response.send(status, [JSON_TYPE, *OWN_FIELDS], data)

    def json(self):
        """The body as a JSON object; {} when it is empty.  Raises BadRequest."""
        try:
            return loads_object(self.body) if self.body else {}
        except ValueError as error:
            raise BadRequest(f'The body must be a JSON object: {error}.') from error


#: On every answer of our own.
OWN_FIELDS = [('cache-control', 'no-store'), ('x-content-type-options', 'nosniff'),
              ('x-frame-options', 'DENY'), ('content-security-policy', "default-src 'none'")]
PLAIN_TEXT = ('content-type', 'text/plain; charset=utf-8')
DASHBOARD_PATH = os.path.join(os.path.dirname(os.path.realpath(__file__)), 'dashboard.html')
LOCAL_NAMES = ('localhost', '127.0.0.1', '[::1]')


def guard(head, port, config):
    """Raises BadRequest for a request that another site's page, or a rebound name, sent."""
    headers = head.headers
    host = headers.get('host', '')
    own_hosts = {name + end for name in LOCAL_NAMES for end in ('', f':{port}')}
    names = {host, host.rpartition(':')[0]}       # an allowed name stands for every port
    if host.lower() not in own_hosts and not names & set(config.allowed_hosts):
        raise Forbidden(f'The Host {printable(host)[:80]!r} is not this proxy: use '
                        f'http://localhost:{port}, or add it to "allowedHosts".')
    origin = headers.get('origin')
    is_allowed = origin in config.allowed_origins
    if origin is not None and not is_allowed and origin != f'http://{host}':
        raise Forbidden('Requests from web pages of another origin are refused; '
                        '"allowedOrigins" adds one.')
    site = headers.get('sec-fetch-site', 'none')
    if not is_allowed and site not in ('same-origin', 'none'):
        raise Forbidden('Requests from another site are refused.')


def check_access(headers, access_token):
    if access_token and not any(presents(headers.get(name, ''), access_token)
                                for name in ('x-api-key', 'authorization')):
        raise BadRequest('The access token is missing or wrong: send it as x-api-key or Bearer '
                         '(the field "accessToken" of the configuration).', 401,
                         'authentication_error')


def check_content_type(head):
    """A body must say that it is JSON (or, for files, multipart): forms of a web page never
    do.  Raises BadRequest."""
    if not (head.is_chunked or head.length):
        return
    content_types = {value.partition(';')[0].strip().lower()
                     for value in head.headers.get('content-type', '').split(',')}
    is_file = content_types == {'multipart/form-data'} and head.target.startswith('/v1/')
    if content_types != {'application/json'} and not is_file:
        raise BadRequest('The body must be sent with content-type: application/json.', 415)


def show_start_page(call):
    text = (f'{PROGRAM} {VERSION} is running, profile {call.profile_name}.\n'
            'Point ANTHROPIC_BASE_URL here; see /dashboard or /health for its state.\n')
    call.response.send(200, [PLAIN_TEXT, *OWN_FIELDS], text.encode())


def show_options(call):
    call.response.send(204, [('allow', ', '.join(METHODS)), *OWN_FIELDS])


def show_dashboard(call):
    """dashboard.html from beside this file, looked up anew each time; what to do without it."""
    try:
        with open(DASHBOARD_PATH, 'rb') as file:
            page = file.read()
    except OSError:
        text = (f'The dashboard is a file of its own: put dashboard.html beside this program, as\n'
                f'{DASHBOARD_PATH}\nWithout it, /health and `{RUN} status` tell the same.\n')
        return call.response.send(404, [PLAIN_TEXT, *OWN_FIELDS], text.encode())
    fields = [field for field in OWN_FIELDS if field[0] != 'content-security-policy']
    fields += [('content-type', 'text/html; charset=utf-8'), ('referrer-policy', 'no-referrer'),
               ('content-security-policy', page_policy(page))]
    call.response.send(200, fields, page)


def page_policy(page):
    """A content security policy that lets only this page's own scripts and styles run."""
    def sources(tag):
        parts = re.findall(rb'<%b>(.*?)</%b>' % (tag, tag), page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(part).digest()).decode() for part in parts)
        return ' '.join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    return (f"default-src 'none'; script-src {sources(b'script')}; style-src {sources(b'style')}; "
            "connect-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; "
            "form-action 'none'")


def api_health(call):
    call.send_json(200, call.app.health())


def api_clear_cooldowns(call):
    """Body: {} for all, {"key": ID} or {"key": ID, "model": NAME}."""
    wanted = call.json()
    for field in ('key', 'model'):
        if not isinstance(wanted.get(field, ''), str):
            raise BadRequest(f'{field} must be a text.')
    refs = [None]
    if wanted.get('key'):
        keys = call.app.store.current.keys
        refs = [ref for ref, key in keys.items() if wanted['key'] in (ref, key.id)]
        if not refs:
            raise UnknownKey(wanted['key'])
    cleared = sum(call.app.cooldowns.clear(ref, wanted.get('model')) for ref in refs)
    call.app.log.info('cooldowns_cleared', key=wanted.get('key'), model=wanted.get('model'),
                      count=cleared)
    call.send_json(200, {'cleared': cleared})


def forward(call):
    app = call.app
    access_token = app.store.current.access_token
    request = ClientRequest(call.head, call.body, call.profile_name, access_token)
    with app.watcher.watching(Exchange(call.connection.sock)) as exchange:
        app.failover.serve(request, call.response, exchange)


class Route(NamedTuple):
    methods: tuple
    pattern: re.Pattern       # of the path, matched whole
    answer: Callable
    is_open: bool = False     # answers without the access token


ROUTES = (
    Route(('OPTIONS',), re.compile(r'/.*'), show_options, is_open=True),
    Route(METHODS, re.compile(r'/v1/.+'), forward),
    Route(('HEAD', 'GET'), re.compile(r'/'), show_start_page, is_open=True),
    Route(('HEAD', 'GET'), re.compile(r'/dashboard(/.*)?'), show_dashboard),
    Route(('HEAD', 'GET'), re.compile(r'/health'), api_health),
    Route(('POST',), re.compile(r'/api/cooldowns/clear'), api_clear_cooldowns),
)


def find_route(head):
    """The Route of a request.  Raises BadRequest: 404, or 405 where only the method is wrong."""
    path = head.target.partition('?')[0]
    known = None
    for route in ROUTES:
        if route.pattern.fullmatch(path):
            if head.method in route.methods:
                return route
            known = route if route.methods != ('OPTIONS',) else known
    if known:
        raise BadRequest(f'{path} takes {" and ".join(known.methods)}.', 405)
    raise BadRequest(f'There is nothing at {printable(path)[:100]}; the API is below /v1/.', 404,
                     'not_found_error')


class Handler(socketserver.BaseRequestHandler):
    """Serves the requests of one client connection, one after another."""

    def handle(self):
        connection = ClientConnection(self.request)
        while self._serve_one(connection):
            pass

    def _serve_one(self, connection):
        """Reads and answers one request; whether another may follow."""
        response = ClientResponse(connection, None)
        was_read = False
        try:
            head = connection.read_head()
            if head is None:
                return False
            response = ClientResponse(connection, head)
            profile_name = self.server.profile_name
            route = self._admit(head, profile_name)
            if 'expect' in head.headers and head.minor_version:
                connection.send(b'HTTP/1.1 100 Continue\r\n\r\n')
            body = connection.read_body(head)
            was_read = True
            route.answer(Call(self.server.app, head, body, response, profile_name, connection))
        except FailoverError as error:
            self._refuse(connection, response, error, was_read)
        except ClientGone:
            return False
        except Exception as error:    # a thread's top: one request must not take others down
            kind = type(error).__name__
            self.server.app.log.error('internal_error', kind=kind, at=where_raised(error))
            if response.started:
                return False
            told = FailoverError(f'{PROGRAM} failed on this request ({kind}); its log says where.')
            self._refuse(connection, response, told, was_read)
        return response.keep_alive and not self.server.app.stopping

    def _admit(self, head, profile_name):
        """The Route of a request that may be answered.  Raises BadRequest."""
        config = self.server.app.store.current
        guard(head, self.server.server_port, config)
        route = find_route(head)
        if not route.is_open:
            check_access(head.headers, config.access_token)
        check_content_type(head)
        if head.length > MAX_BODY_BYTES:
            raise too_large()
        if profile_name not in config.profiles:
            raise BadRequest(f'The profile {profile_name} is gone.', 404, 'not_found_error')
        return route

    def _refuse(self, connection, response, error, was_read):
        if response.started:
            return
        response.keep_alive = response.keep_alive and was_read
        self.server.app.log.debug('refused', status=error.status, message=str(error))
        fields = [JSON_TYPE, ('request-id', new_request_id()), *OWN_FIELDS]
        try:
            response.send(error.status, fields, error_json(error.type, str(error)))
        except ClientGone:
            return
        if not response.keep_alive:
            connection.drain()


def where_raised(error):
    """'proxy:1234 < _serve_one:1200': functions and lines of a traceback, without any value."""
    frames, step = [], error.__traceback__
    while step:
        frames.append(f'{step.tb_frame.f_code.co_name}:{step.tb_lineno}')
        step = step.tb_next
    return ' < '.join(reversed(frames))


class Listener(http.server.ThreadingHTTPServer):
    """The port of one profile: a thread for each connection."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024     # the default of 5 drops connections under load: 1 s and more

    def __init__(self, profile, app):
        self.profile_name, self.wanted_port, self.app = profile.name, profile.port, app
        self._is_closing = False
        super().__init__((LISTEN_HOST, profile.port), Handler)

    def server_bind(self):
        # Not HTTPServer's: it looks up the host's full name, seconds where DNS is broken.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def serve_forever(self, poll_interval=None):
        """Accepts until `shutdown`, blocked in accept: nothing wakes while nobody comes."""
        while not self._is_closing:
            try:
                request, client_address = self.get_request()
            except OSError:
                # The end, or no file descriptor left: others will close theirs.
                time.sleep(0 if self._is_closing else 0.05)
                continue
            self.process_request(request, client_address)

    def shutdown(self):
        self._is_closing = True
        with contextlib.suppress(OSError):        # macOS: "not connected"; closing wakes it
            self.socket.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def process_request(self, request, client_address):
        if self.app.slots.acquire(blocking=False):
            try:
                return super().process_request(request, client_address)
            except RuntimeError:      # no further thread to be had: as good as too many
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
        self.app.log.error('connection_failed', kind=type(sys.exc_info()[1]).__name__,
                           at=where_raised(sys.exc_info()[1]))


TOO_MANY_BODY = error_json('overloaded_error', f'{PROGRAM}: over {MAX_CONNECTIONS} connections.')
TOO_MANY = (b'HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n'
            b'connection: close\r\ncontent-length: %d\r\n\r\n%b'
            % (len(TOO_MANY_BODY), TOO_MANY_BODY))


# ==============================================================================
# Service
# ==============================================================================

class PortTaken(FailoverError):
    """A profile's port could not be opened."""


class App:
    """The parts put together: built once, started, reloaded, stopped."""

    def __init__(self, config_path):
        self.store = ConfigStore(config_path)
        self.store.load()
        config = self.store.current
        self.log = JsonLog(log_path(config_path), config.log_level, config.max_log_size)
        self.metrics = Metrics()
        self.cooldowns = Cooldowns()
        self.watcher = Watcher()
        self.upstream = Upstream()
        self.failover = Failover(self.store, self.cooldowns, self.upstream,
                                 Journal(self.log, self.metrics))
        self.slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.listeners = {}           # profile name -> Listener
        self.port_problems = {}       # profile name -> why its port is not open
        self.stopping = False
        self._stop = threading.Event()
        self._started = time.monotonic()

    def start(self):
        """Opens every profile's port.  Raises PortTaken, with none left open."""
        self._open_listeners()
        if self.port_problems:
            self._close_listeners(self.listeners.values())
            raise PortTaken(' '.join(self.port_problems.values()))
        self.log.start()
        self.watcher.start()
        threading.Thread(target=self.upstream.tls_context, name='tls', daemon=True).start()
        threading.Thread(target=self._reload_loop, name='reload', daemon=True).start()
        self.log.info('started', version=VERSION, pid=os.getpid(), ports=self.ports())

    def ports(self):
        return {name: listener.server_port for name, listener in self.listeners.items()}

    def _open_listeners(self):
        """Brings the open ports in line with the configuration.  A port that stays open keeps
        its connections, whichever profile it belongs to now; a profile whose new port is
        taken keeps its old one."""
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
            return                    # this start fails; the note may be another proxy's
        for name, listener in self.listeners.items():
            listener.profile_name, listener.wanted_port = name, wanted[name].port
        self._close_listeners(set(before.values()) - set(self.listeners.values()))
        self._tell_running()

    def _open_listener(self, profile):
        """A new Listener, or None with the reason among `port_problems`."""
        try:
            listener = Listener(profile, self)
        except OSError as error:
            self.port_problems[profile.name] = (f'Port {profile.port} of profile {profile.name} '
                                                f'cannot be opened ({error.strerror}).')
            return None
        threading.Thread(target=listener.serve_forever, name='listen', daemon=True).start()
        return listener

    def _close_all(self):
        listeners, self.listeners = self.listeners, {}
        self._close_listeners(listeners.values())
        self._tell_running()

    def _close_listeners(self, listeners):
        for listener in listeners:
            listener.shutdown()

    def _tell_running(self):
        """Leaves a note of pid and ports for `status`, which may find the configuration
        broken, or changed, or with ports that the system chose."""
        path = running_path(self.store.path)
        with contextlib.suppress(OSError):        # it is only a help; /health tells all
            if self.listeners:
                make_private_folder(os.path.dirname(path))
                note = {'pid': os.getpid(), 'ports': self.ports()}
                write_atomically(path, json.dumps(note).encode())
            else:
                os.unlink(path)

    def _reload_loop(self):
        while not self._stop.wait(RELOAD_S):
            try:
                self.reload()
                self.upstream.close_idle(POOL_IDLE_S)
            except Exception as error:        # a thread's top: the next look may go better
                self.log.error('reload_failed', kind=type(error).__name__, at=where_raised(error))

    def reload(self):
        """Takes up a changed configuration; opens ports that could not be opened before."""
        before = self.store.current
        try:
            has_changed = self.store.reload_if_changed()
        except ConfigError as error:          # the folder cannot be read: say so once
            has_changed = self.store.problem != str(error)
            self.store.problem = str(error)
        if has_changed and self.store.problem:
            self.log.error('config_refused', message=self.store.problem)
        config = self.store.current
        if config is not before:
            self.log.configure(config.log_level, config.max_log_size)
            for ref, key in before.keys.items():
                if ref not in config.keys or config.keys[ref].token != key.token:
                    self.cooldowns.clear(ref)
            self.cooldowns.wake_all()
            self.log.info('config_reloaded', profiles=len(config.profiles), keys=len(config.keys))
        if config is not before or self.port_problems:
            known = self.port_problems
            self._open_listeners()
            for name in self.port_problems.keys() - known.keys():
                self.log.error('port_not_opened', profile=name, message=self.port_problems[name])

    def run(self):
        """Serves until `stop`; a running answer may go on for DRAIN_S."""
        self._stop.wait()
        self.stopping = self.failover.stopping = True
        self._close_all()
        self.cooldowns.wake_all()
        deadline = time.monotonic() + DRAIN_S
        while len(self.watcher) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.upstream.close_idle()
        self.log.info('stopped', cut=len(self.watcher))
        self.log.close()

    def stop(self):
        self._stop.set()

    def health(self):
        """What /health tells: no token but masked."""
        config = self.store.current
        cooling = self.cooldowns.snapshot()
        metrics, recent = self.metrics.snapshot()
        keys = [self._key_health(key, cooling, metrics) for key in config.keys.values()]
        log_problem = f'The log {self.log.path} cannot be written.' if self.log.failed else None
        problems = [problem for problem in (self.store.problem, log_problem,
                                            *self.port_problems.values()) if problem]
        return {
            'status': health_status(keys, problems), 'program': PROGRAM, 'version': VERSION,
            'pid': os.getpid(), 'uptime_s': round(time.monotonic() - self._started),
            'config': self.store.path, 'log': self.log.path, 'problems': problems,
            'profiles': [{'name': p.name, 'port': self.ports().get(p.name), 'order': p.order}
                         for p in config.profiles.values()],
            'keys': keys,
            'cooldowns': [cooldown_health(c, left_s) for c, left_s in cooling],
            'active': len(self.watcher), 'waiting': self.cooldowns.queue_length(),
            'metrics': metrics, 'recent': recent}

    def _key_health(self, key, cooling, metrics):
        mine = [c for c, _ in cooling if c.key.ref == key.ref]
        return {
            'id': key.id, 'label': key.label, 'provider': key.provider,
            'token': mask_token(key.token), 'type': 'oauth' if key.oauth else 'api-key',
            'state': key_state(key, mine),
            'needs_attention': any(c.outcome.rule.attention for c in mine),
            'answers': metrics['by_key'].get(key.id, 0)}


def token_problem(key):
    """Why a key's token cannot be read where it is kept, or None."""
    try:
        read_token(key.token)
    except TokenUnavailable as error:
        return str(error)
    return None


def key_state(key, coolings):
    """'unused' (its provider is not served), 'no token' (where it should be read), 'cooling'
    (for every model), 'limited' (for some), 'ready'."""
    if key.provider not in SERVED_PROVIDERS:
        return 'unused'
    if token_problem(key):
        return 'no token'
    if any(cooling.model is None for cooling in coolings):
        return 'cooling'
    return 'limited' if coolings else 'ready'


def health_status(keys, problems):
    """'ok', 'problem' (configuration, port, log), 'exhausted' (no key can be used), 'no_keys'
    (the clients' own credentials are)."""
    if problems:
        return 'problem'
    if not keys:
        return 'no_keys'
    is_resting = all(key['state'] in ('cooling', 'no token', 'unused') for key in keys)
    return 'exhausted' if is_resting else 'ok'


def cooldown_health(cooling, left_s):
    return {'key': cooling.key.id, 'model': cooling.model, 'reason': cooling.outcome.rule.name,
            'status': cooling.outcome.status, 'message': cooling.outcome.message[:300],
            'remaining_ms': round(left_s * 1000), 'until': utc_text(time.time() + left_s),
            'needs_attention': cooling.outcome.rule.attention}


def running_path(config_path):
    return os.path.join(os.path.dirname(config_path), 'running.json')


def log_path(config_path):
    return os.path.join(os.path.dirname(config_path), 'logs', f'{PROGRAM}.log')


def harden_process():
    """Files private from their first moment, no memory dumps, sockets enough."""
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
# Command line
# ==============================================================================
# Printing happens only here.  Exit status: 0 done, 1 failed, 2 wrong input.

class Style:
    """Colours, on a terminal that wants them."""
    def __init__(self, stream, environ=os.environ):
        wanted = stream.isatty() and not environ.get('NO_COLOR') and environ.get('TERM') != 'dumb'
        self._wanted = wanted

    def _paint(self, code, text):
        return f'\x1b[{code}m{text}\x1b[0m' if self._wanted else str(text)

    def bold(self, text):
        return self._paint(1, text)

    def dim(self, text):
        return self._paint(2, text)

    def good(self, text):
        return self._paint(32, text)

    def warn(self, text):
        return self._paint(33, text)

    def bad(self, text):
        return self._paint(31, text)


def say(text=''):
    print(text, flush=True)


def count_of(number, noun):
    """'1 answer', '2 answers'."""
    return f'{number} {noun}' if number == 1 else f'{number} {noun}s'


def complain(text):
    print(f'{PROGRAM}: {text}', file=sys.stderr, flush=True)


def say_json(value):
    say(json.dumps(value, indent=2))


def say_table(rows, indent='  '):
    """Rows of texts in columns."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        say((indent + '  '.join(str(cell).ljust(w) for cell, w in zip(row, widths))).rstrip())


def cmd_start(options):
    harden_process()
    app = App(options.config)
    try:
        app.start()
    except PortTaken as error:
        running = fetch_health(options.config, app.store.current)
        if running:
            raise FailoverError(f'{PROGRAM} {running["version"]} is running already (pid '
                                f'{running["pid"]}). See: {RUN} status') from error
        raise PortTaken(f'{error} Stop the program that uses it, or give the profile another '
                        f'"port" in {options.config}.') from error
    try:
        stop_on_signals(app)
        with contextlib.suppress(OSError):        # serving does not depend on being heard
            say_started(app)
        app.run()
    finally:
        # Not by way of the interpreter's end: it would pull OpenSSL away under threads that
        # are still inside it.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(1 if sys.exc_info()[0] else 0)


def stop_on_signals(app):
    """The first SIGTERM or SIGINT drains, the second ends at once.

    A signal may reach any thread, and only wakes that one: so its number goes over a socket
    to a thread that waits for it, not to a handler that the waiting main thread would run.
    """
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
    style, config = Style(sys.stdout), app.store.current
    say(f'{style.bold(PROGRAM)} {VERSION}; Ctrl-C stops it')
    say_table([[printable(name), f'http://localhost:{port}']
               for name, port in app.ports().items()])
    say(f'Keys       {describe_keys(config)}')
    missing = '' if os.path.exists(DASHBOARD_PATH) else f' (needs dashboard.html beside {RUN[8:]})'
    say(f'Dashboard  http://localhost:{next(iter(app.ports().values()))}/dashboard{missing}')
    say(f'Log        {app.log.path}')
    for warning in start_warnings(app):
        complain(warning)
    if not any(key.provider == ANTHROPIC for key in config.keys.values()):
        say(style.warn("There is no key yet: requests go out with the client's own credential."))
        say(f'Add one with: {RUN} add-key')


def start_warnings(app):
    """What a person should look at, though it stops nothing."""
    config = app.store.current
    if app.store.notice:
        yield app.store.notice
    for name in unknown_fields(config):
        yield f'the configuration has a field {printable(name)}, which is not known here.'
    for key in config.keys.values():
        problem = token_problem(key)
        if problem:
            yield f'key {key.id} cannot be used: {problem}.'


def describe_keys(config):
    count = collections.Counter(key.provider for key in config.keys.values())
    text = f'{count[ANTHROPIC]} Anthropic'
    if count[OPENAI]:
        text += f', {count[OPENAI]} OpenAI (kept, but this version does not use them)'
    return text


def cmd_add_key(options):
    token, style = read_new_token(options), Style(sys.stdout)
    label = options.label_option or ' '.join(options.label)
    label = label.encode('utf-8', 'replace').decode()     # an argument may be no UTF-8
    added = []

    def edit(config):
        edited, key = add_key(config, token, label, utc_text(time.time()), options.base_url)
        added[:] = [key]
        return edited
    config = ConfigStore(options.config).update(edit)
    key = added[0]
    say(f'Added key {style.bold(key.id)} ({mask_token(key.token)}), '
        f'{describe_places(config, key)}.')
    problem = token_problem(key)
    if problem:
        complain(f'it cannot be used yet: {problem}.')
    if fetch_health(options.config, config):
        say(f'The running proxy takes it up within {RELOAD_S} s.')
    elif len(config.keys) == 1:
        say(f'Start the proxy with: {RUN} start')
    return 0


def describe_places(config, key):
    """'first in profile default, number 3 in profile work'."""
    places = {p.name: p.order.index(key.ref) + 1 for p in config.profiles.values()}
    return ', '.join(f'{"first" if place == 1 else f"number {place}"} in profile {printable(name)}'
                     for name, place in places.items())


def read_new_token(options):
    """The token from the command line, standard input (`-`) or a prompt without echo."""
    if options.token == '-':
        return sys.stdin.readline()
    if options.token:
        if not options.token.startswith(('env:', 'file:')):
            complain('a token on the command line stays in the shell\'s history; without it, '
                     'add-key asks for it.')
        return options.token
    if not sys.stdin.isatty():
        raise UsageError('There is no terminal to ask on: give the token, or - to read it from '
                         'standard input.')
    import getpass
    try:
        return getpass.getpass('API key or OAuth token (not shown): ')
    except EOFError as error:
        raise UsageError('No token came: nothing was added.') from error


def cmd_remove_key(options):
    store = ConfigStore(options.config)
    store.update(lambda config: remove_key(config, options.id))
    say(f'Removed key {printable(options.id)}.')
    return 0


def cmd_list_keys(options):
    store = ConfigStore(options.config)
    store.load()
    config = store.current
    health = fetch_health(options.config, config)
    states = {(k['provider'], k['id']): k['state'] for k in health['keys']} if health else {}
    unknown = 'not loaded yet' if health else 'not running'
    keys = [{'id': key.id, 'label': printable(key.label)[:40], 'provider': key.provider,
             'token': mask_token(key.token), 'state': states.get((key.provider, key.id), unknown)}
            for key in config.keys.values()]
    if options.json:
        say_json({'keys': keys, 'profiles': {p.name: p.order for p in config.profiles.values()}})
    elif not keys:
        say(f'No keys. Add one with: {RUN} add-key')
    else:
        heads = [name.upper() for name in keys[0]]
        say_table([heads, *(list(key.values()) for key in keys)], indent='')
        for profile in config.profiles.values():
            say(f'Profile {printable(profile.name)} (port {profile.port}): '
                + ' -> '.join(profile.order))
    return 0


def fetch_health(config_path, config):
    """/health of the proxy that runs with this configuration file; None when none does.

    It is looked for where it said that it is, and where `config` (None: broken) says so.
    """
    ports = [profile.port for profile in config.profiles.values()] if config else []
    note = running_path(config_path)
    with contextlib.suppress(OSError, ValueError), open(note, 'rb') as file:     # none: none runs
        ports = [*as_dict(loads_object(file.read()).get('ports')).values(), *ports]
    headers = {'x-api-key': config.access_token} if config and config.access_token else {}
    for port in dict.fromkeys(port for port in ports if is_whole(port) and 0 < port < 65536):
        health = fetch_json(port, '/health', headers)
        if health and health.get('program') == PROGRAM:
            return health
    return None


def fetch_json(port, path, headers):
    """The JSON object at a port of this machine; None when there is none."""
    connection = http.client.HTTPConnection(LISTEN_HOST, port, timeout=3)
    try:
        connection.request('GET', path, headers=headers)
        return loads_object(connection.getresponse().read())
    except (OSError, ValueError, http.client.HTTPException):
        return None                   # nothing there, or another program
    finally:
        connection.close()


def running_health(options):
    """/health of the running proxy, also when the file that it runs with is broken by now.
    Raises FailoverError when there is none."""
    store, problem = ConfigStore(options.config), None
    try:
        store.load()
    except ConfigError as error:
        problem = error
    health = fetch_health(options.config, None if problem else store.current)
    if health is None:
        raise problem or FailoverError(f'not running. Start it with: {RUN} start')
    return health


def cmd_health(options):
    health = running_health(options)
    say_json(health)
    return 0 if health['status'] in ('ok', 'no_keys') else 1


def cmd_status(options):
    health = running_health(options)
    if options.json:
        say_json(health)
        return 0
    style, metrics = Style(sys.stdout), health['metrics']
    say(f'{style.bold(PROGRAM)} {health["version"]} is {style.good("running")}, '
        f'pid {health["pid"]}, for {format_duration(health["uptime_s"])}')
    for problem in health['problems']:
        say(style.bad(f'  {printable(problem)}'))
    say_table([[printable(profile['name']), f'http://localhost:{profile["port"]}'
                if profile['port'] else 'not open'] for profile in health['profiles']])
    say_keys(health, style)
    say(f'Requests   {metrics["requests"]} ({metrics["answered"]} answered, '
        f'{metrics["refused"]} refused, {metrics["failed"]} failed, '
        f'{health["active"]} running, {health["waiting"]} waiting)')
    say(f'Saved by   {count_of(metrics["rotations"], "rotation")}, '
        f'{count_of(metrics["fallbacks"], "fallback")}, {metrics["queued"]} queued')
    return 0


def say_keys(health, style):
    if not health['keys']:
        say(f'Keys       none; add one with: {RUN} add-key')
        return
    say('Keys')
    columns = ('id', 'provider', 'token', 'state')
    say_table([[*(key[column] for column in columns), count_of(key['answers'], 'answer')]
               for key in health['keys']])
    for cooling in health['cooldowns']:
        model = f' with {printable(cooling["model"])}' if cooling['model'] else ''
        rest = format_duration(cooling['remaining_ms'] / 1000)
        why = f'{cooling["status"] or ""} {cooling["reason"]}'.strip()
        text = f'  {cooling["key"]}{model} rests for {rest}: {why}'
        if cooling['message']:
            text += f', "{printable(cooling["message"])[:100]}"'
        say(style.bad(text) if cooling['needs_attention'] else style.warn(text))


def cmd_logs(options):
    path, style = log_path(options.config), Style(sys.stdout)
    lines = follow_lines(path)
    so_far = itertools.takewhile(lambda line: line is not None, lines)
    last = list(collections.deque(so_far, maxlen=max(0, options.lines)))
    for line in last:
        say_log_line(line, options.json, style)
    if not last:
        complain(f'there is no log line yet in {path}')
    while options.follow:
        line = next(lines)
        if line is None:
            time.sleep(0.25)
        else:
            say_log_line(line, options.json, style)
    return 0


def follow_lines(path):
    """Yields the lines of a log, those of its rotated file first; None where it ends for now.
    Goes on in the file that follows a rotation, after the last line of the one before."""
    with contextlib.suppress(OSError), open(path + '.1', 'rb') as file:
        yield from file.read().splitlines()
    file, rest = None, b''
    while True:
        if file is None:
            with contextlib.suppress(OSError):    # none is there yet
                file, rest = open(path, 'rb'), b''
        if file is None:
            yield None
            continue
        has_rotated = not is_same_file(file, path)      # asked before the last read, not after
        *lines, rest = (rest + file.read()).split(b'\n')
        yield from lines
        if has_rotated:
            file.close()
            file = None
        else:
            yield None


def is_same_file(file, path):
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:         # between a rotation and the next line
        return False


def say_log_line(line, as_json, style):
    """A log line as JSON, or as: time, level, event, then its fields."""
    text = line.decode('utf-8', 'replace')
    try:
        record = loads_object(text)
    except ValueError:
        record = None
    if as_json or record is None:
        return say(printable(text))
    when = local_time(record.pop('time', ''))
    level, event = printable(record.pop('level', '')), printable(record.pop('event', ''))
    if event == 'request':
        told = describe_request(record)
    else:
        told = ' '.join(f'{name}={describe_field(value)}' for name, value in record.items()
                        if value not in (None, ''))
    paint = {'error': style.bad, 'warn': style.warn, 'debug': style.dim}.get(level, str)
    say(f'{style.dim(when)} {paint(f"{level:5}")} {event} {told}')


def describe_field(value):
    return printable(value if isinstance(value, str) else json.dumps(value))


def local_time(text):
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
    attempts = record.get('attempts') or ()
    if attempts:
        text += ': ' + ' -> '.join(f'{a["key"]} {a["status"] or a["result"]}' for a in attempts)
    if record.get('error'):
        text += f' ({record["error"]})'
    return printable(text)


class Command(NamedTuple):
    name: str
    help: str
    run: Callable
    arguments: tuple = ()     # ((names, options), ...) for argparse


JSON_OPTION = (('--json',), {'action': 'store_true', 'help': 'as JSON, for scripts'})

COMMANDS = (
    Command('start', 'run the proxy in the foreground, until Ctrl-C', cmd_start),
    Command('status', 'what the running proxy does: ports, keys, cooldowns, requests', cmd_status,
            (JSON_OPTION,)),
    Command('health', "the running proxy's /health as JSON; exit status 0 when all is well",
            cmd_health),
    Command('add-key', 'add an Anthropic API key or OAuth token', cmd_add_key, (
        (('token',), {'nargs': '?', 'help': 'the token, env:NAME, file:PATH, or - for standard '
                                            'input; without it you are asked, unseen'}),
        (('label',), {'nargs': '*', 'help': 'a name for it'}),
        (('--label',), {'dest': 'label_option', 'metavar': 'LABEL', 'help': 'the same'}),
        (('--base-url',), {'metavar': 'URL', 'help': "another server with Anthropic's API"}))),
    Command('remove-key', 'remove a key', cmd_remove_key, (
        (('id',), {'help': 'as list-keys shows it'}),)),
    Command('list-keys', "the keys and each profile's order", cmd_list_keys, (JSON_OPTION,)),
    Command('logs', 'the last log lines', cmd_logs, (
        (('-f', '--follow'), {'action': 'store_true', 'help': 'go on with new lines'}),
        (('-n', '--lines'), {'type': int, 'default': 20, 'metavar': 'N', 'help': 'how many (20)'}),
        JSON_OPTION)),
)


def argument_parser():
    import argparse
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description='A local proxy that keeps Claude Code and other Anthropic '
        'clients answered when a key is rate-limited.')
    parser.add_argument('--version', action='version', version=f'{PROGRAM} {VERSION}')
    config_option = {'metavar': 'PATH', 'help': f'the configuration file ({DEFAULT_CONFIG_PATH}; '
                                                'or CLAUDE_FAILOVER_CONFIG)'}
    parser.add_argument('--config', **config_option)
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    for command in COMMANDS:
        sub = commands.add_parser(command.name, help=command.help, description=command.help)
        sub.add_argument('--config', default=argparse.SUPPRESS, **config_option)
        for names, options in command.arguments:
            sub.add_argument(*names, **options)
        sub.set_defaults(run=command.run)
    return parser


# ==============================================================================
# Main
# ==============================================================================

def main(argv=None):
    """Runs one command; its exit status."""
    prepare_output()
    options = argument_parser().parse_args(argv)
    chosen = options.config or os.environ.get('CLAUDE_FAILOVER_CONFIG') or DEFAULT_CONFIG_PATH
    options.config = os.path.abspath(os.path.expanduser(chosen))
    try:
        return options.run(options)
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


def leave_output():
    """Keeps the interpreter from failing once more on what could not be written."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def prepare_output():
    """Output that cannot fail on a character, nor by being closed from the start (a daemon)."""
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, 'w'))
        getattr(sys, name).reconfigure(errors='replace')


if __name__ == '__main__':
    sys.exit(main())
