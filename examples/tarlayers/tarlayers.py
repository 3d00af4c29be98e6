#!/usr/bin/env python3
"""A layer plug-in for Sluice, with nothing but Python's standard library: tar archives as layers.

    lowerdir=//tar//srv/image.tar       one layer
    lowerdir=//tar//srv/image           one for each *.tar in the directory, the first by name being the uppermost

Sluice starts it (--plugin) with a SOCK_SEQPACKET socket as descriptor 3. docs/layer-plugins.md is the protocol. It answers one
request at a time, which is allowed; so there is never one to cancel. Files are handed over as sealed memory (memfd_create(2)):
the guest reads them without coming by here.
"""

import array
import collections
import errno
import fcntl
import json
import os
import posixpath
import socket
import stat
import struct
import sys
import tarfile

PROTO = 1
MAX_MESSAGE = 64 << 10
HEADER = struct.Struct("<IHHQII")  # size, op, kind, id, layer or errno, reserved
ATTR = struct.Struct("<QQQqqqIIIIIIIIII")
ENTRY = struct.Struct("<QQBBHI")  # ino, cookie, type, flags, length of the name, reserved
REQUEST, REPLY = 0, 1
LAYER_STABLE_INO, LAYER_XATTR = 2, 4
MAX_OPEN = 64  # files in memory that are kept in case they are opened again

OPS = ["num_of_layers", "load_data_source", "cleanup", "statat", "opendir", "readdir", "closedir", "openat", "listxattr",
       "getxattr", "readlinkat", "lookup", "open", "cancel", "release"]
XATTR = "SCHILY.xattr."  # of extended attributes in pax headers


class Node:
    """A file of an archive."""

    def __init__(self, ino, mode):
        self.ino, self.mode, self.nlink = ino, mode, 1
        self.size = self.uid = self.gid = self.mtime = self.major = self.minor = 0
        self.target, self.member, self.xattrs, self.children = "", None, {}, {}

    def attr(self):
        second = int(self.mtime // 1)
        nano = int(self.mtime % 1 * 1e9)
        return ATTR.pack(self.ino, self.size, (self.size + 511) // 512, second, second, second, nano, nano, nano,
                         self.mode, self.nlink, self.uid, self.gid, self.major, self.minor, 0)


class Layer:
    """An archive, of which the names are kept and the contents read when they are asked for."""

    def __init__(self, path):
        self.tar = tarfile.open(path, "r:*")
        self.nodes = {".": Node(1, stat.S_IFDIR | 0o755)}
        self.files = collections.OrderedDict()  # descriptors by inode number, the one used last at the end
        for member in self.tar:
            self.add(member)

    def add(self, member):
        path = posixpath.normpath(member.name.lstrip("/"))
        if path.startswith("../") or path == "..":
            raise OSError(errno.EINVAL, "the archive has a file outside: " + member.name)
        if member.islnk():
            target = self.nodes.get(posixpath.normpath(member.linkname.lstrip("/")))
            if target is None:
                raise OSError(errno.EINVAL, "the archive has a link to nothing: " + member.name)
            target.nlink += 1
            self.place(path, target)
            return
        node = Node(len(self.nodes) + 1, member.mode & 0o7777)
        for kind, is_kind in ((stat.S_IFDIR, member.isdir()), (stat.S_IFLNK, member.issym()), (stat.S_IFIFO, member.isfifo()),
                              (stat.S_IFCHR, member.ischr()), (stat.S_IFBLK, member.isblk()), (stat.S_IFREG, member.isreg())):
            if is_kind:
                node.mode |= kind
        node.uid, node.gid, node.mtime = member.uid, member.gid, float(member.pax_headers.get("mtime", member.mtime))
        if member.isreg():
            node.size, node.member = member.size, member
        elif member.issym():
            node.target, node.size = member.linkname, len(os.fsencode(member.linkname))
        elif member.ischr() or member.isblk():
            node.major, node.minor = member.devmajor, member.devminor
        for key, value in member.pax_headers.items():
            if key.startswith(XATTR):
                node.xattrs[os.fsencode(key[len(XATTR):])] = value.encode("utf-8", "surrogateescape")
        self.place(path, node)

    def place(self, path, node):
        """Puts a node at a path. Directories above it that the archive does not have are made up."""
        old = self.nodes.get(path)
        if old is not None and stat.S_ISDIR(node.mode):
            node.children = old.children
        self.nodes[path] = node
        if path == ".":
            return
        parent, name = posixpath.split(path)
        parent = parent or "."
        if parent not in self.nodes:
            self.place(parent, Node(len(self.nodes) + 1, stat.S_IFDIR | 0o755))
        self.nodes[parent].children[name] = node

    def find(self, path):
        node = self.nodes.get(path)
        if node is None:
            raise OSError(errno.ENOENT, "no such file")
        return node

    def open(self, node):
        """Returns a descriptor of a file in memory that nobody can change. It stays the layer's."""
        if not stat.S_ISREG(node.mode):
            raise OSError(errno.EINVAL, "no regular file")
        if node.ino in self.files:
            self.files.move_to_end(node.ino)
            return self.files[node.ino]
        fd = os.memfd_create("layer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with self.tar.extractfile(node.member) as source:
                while chunk := source.read(1 << 20):
                    while chunk:
                        chunk = chunk[os.write(fd, chunk):]
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
        except BaseException:
            os.close(fd)
            raise
        self.files[node.ino] = fd
        while len(self.files) > MAX_OPEN:
            os.close(self.files.popitem(last=False)[1])
        return fd

    def close(self):
        while self.files:
            os.close(self.files.popitem()[1])
        self.tar.close()


def archives(data, path):
    """Returns the archives that //tar/DATA/PATH is."""
    if data:
        raise OSError(errno.EINVAL, "DATA is not empty")
    path = "/" + path  # PATH has lost the slash that ended DATA
    if os.path.isdir(path):
        return [os.path.join(path, name) for name in sorted(os.listdir(path)) if name.endswith(".tar")]
    return [path]


class Request:
    """What is left of a request, from the front."""

    def __init__(self, message):
        self.message = message

    def take(self, form):
        form = struct.Struct("<" + form)
        values = form.unpack_from(self.message)
        self.message = self.message[form.size:]
        return values

    def string(self):
        length, = self.take("H")
        value, self.message = self.message[:length], self.message[length:]
        return os.fsdecode(bytes(value))


class Plugin:
    """The connection to the server, and what it has loaded."""

    def __init__(self, sock):
        self.sock, self.layers, self.dirs, self.last_dir = sock, {}, {}, 0

    def run(self):
        self.sock.send(json.dumps({"proto": PROTO, "name": "tar", "ops": OPS}).encode())
        hello = json.loads(self.sock.recv(MAX_MESSAGE))
        if hello.get("proto") != PROTO:
            sys.exit("the server speaks version %s of the protocol, expected %d" % (hello.get("proto"), PROTO))
        while message := self.sock.recv(MAX_MESSAGE + 1):
            size, op, kind, number, layer, reserved = HEADER.unpack_from(message)
            if size != len(message) or kind != REQUEST or reserved or not 1 <= op <= len(OPS):
                sys.exit("the server sent what is no request")
            name = OPS[op - 1]
            if name == "cancel":
                continue
            error, body, fd = 0, b"", -1
            try:
                body, fd = self.answer(name, layer, Request(message[HEADER.size:]))
            except OSError as e:
                error = e.errno or errno.EIO
            except tarfile.TarError:
                error = errno.EIO
            header = HEADER.pack(HEADER.size + len(body), op, REPLY, number, error, 0)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
            self.sock.sendmsg([header, body], rights)
            if name == "release":
                return

    def answer(self, name, number, request):
        """Returns what follows the header of the reply, and the descriptor that goes with it, or -1."""
        if name == "num_of_layers":
            return struct.pack("<I", len(archives(request.string(), request.string()))), -1
        if name == "load_data_source":
            index, = request.take("I")
            found = archives(request.string(), request.string())
            if index >= len(found):
                raise OSError(errno.EINVAL, "no such layer")
            self.layers[number] = Layer(found[index])
            return struct.pack("<IIQ", LAYER_STABLE_INO | LAYER_XATTR, 0, 0), -1
        if name == "release":
            return b"", -1
        layer = self.layers.get(number)
        if layer is None:
            raise OSError(errno.ESTALE, "no such layer")
        if name == "cleanup":
            self.layers.pop(number).close()
        elif name == "statat":
            return layer.find(request.string()).attr(), -1
        elif name == "opendir":
            node = layer.find(request.string())
            if not stat.S_ISDIR(node.mode):
                raise OSError(errno.ENOTDIR, "no directory")
            self.last_dir += 1
            self.dirs[self.last_dir] = sorted(node.children.items())
            return struct.pack("<Q", self.last_dir), -1
        elif name == "readdir":
            return self.readdir(*request.take("QQII")), -1
        elif name == "closedir":
            self.dirs.pop(request.take("Q")[0], None)
        elif name == "openat":
            _flags, = request.take("I")
            node = layer.find(request.string())
            return node.attr(), layer.open(node)
        elif name == "readlinkat":
            return os.fsencode(layer.find(request.string()).target), -1
        elif name == "listxattr":
            return b"".join(key + b"\0" for key in layer.find(request.string()).xattrs), -1
        elif name == "getxattr":
            xattrs = layer.find(request.string()).xattrs
            key = os.fsencode(request.string())
            if key not in xattrs:
                raise OSError(errno.ENODATA, "no such attribute")
            return xattrs[key], -1
        else:  # lookup and open are for layers that are directories
            raise OSError(errno.EOPNOTSUPP, "no such operation")
        return b"", -1

    def readdir(self, number, cookie, room, plus):
        """Returns the entries after cookie, which counts them, that fit."""
        entries = self.dirs.get(number)
        if entries is None:
            raise OSError(errno.EBADF, "no such directory")
        out, count, room = b"", 0, room - 8
        for name, node in entries[cookie:]:
            name = os.fsencode(name)
            entry = ENTRY.pack(node.ino, cookie + count + 1, node.mode >> 12, plus & 1, len(name), 0)
            entry += (node.attr() if plus & 1 else b"") + name
            if len(out) + len(entry) > room:
                break
            out, count = out + entry, count + 1
        return struct.pack("<II", cookie + count == len(entries), count) + out


def main():
    try:
        sock = socket.socket(fileno=3)
    except OSError:
        sock = None
    if sock is None or sock.type != socket.SOCK_SEQPACKET:
        sys.exit("descriptor 3 is no SOCK_SEQPACKET socket: this is a layer plug-in, which Sluice starts (--plugin)")
    Plugin(sock).run()


if __name__ == "__main__":
    main()
