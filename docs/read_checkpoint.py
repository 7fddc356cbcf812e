"""Read and verify one rank: python read_checkpoint.py CHECKPOINT [RANK]. Objects stay pickles (format.md)."""

import base64, hashlib, json, struct, sys, zlib  # noqa: E401 - short on purpose
import numpy as np  # isort: skip

BITS = {"bfloat16": "<u2", "complex32": "<u4", "bcomplex32": "<u4", "bits16": "<u2", "bool": "?"}  # as bits


def expect(condition, name):
    if not condition:
        sys.exit(f"damaged: {name}")


def read(folder, rank=0):
    raw = open(f"{folder}/manifest.json", "rb").read()
    frame = b'{"sha256":"%s","body":%s}' % (hashlib.sha256(raw[84:-1]).hexdigest().encode(), raw[84:-1])
    expect(raw == frame, "manifest.json")
    manifest = json.loads(raw[84:-1])
    expect(manifest["version"][0] == 1 and set(manifest["requires"]) <= {"shards"}, "a later format")
    raw = open(f"{folder}/index_{rank}.json", "rb").read()
    expect(hashlib.sha256(raw).hexdigest() == manifest["indexes"][rank]["sha256"], f"index_{rank}.json")
    index = json.loads(raw)
    tensors, records, name = index["tensors"], [], index["files"][0]["name"]
    data, crcs = np.asarray(np.memmap(f"{folder}/{name}", np.uint8, "r")), iter(index["records"]["crcs"])
    for start, length in zip(index["records"]["offset"], index["records"]["length"], strict=True):
        records.append(data[start : start + length])
        for at in range(0, length, 262144):
            expect(zlib.crc32(records[-1][at : at + 262144]) == next(crcs), f"{name} at byte {start + at}")

    def tensor(n):
        name, shape, start = (tensors[column][n] for column in ("dtype", "shape", "byte_offset"))
        kind = np.dtype(BITS.get(name, "u1" if name.startswith(("float8", "float4", "bits")) else name))
        memory = bytes(kind.itemsize) if 0 in shape else records[tensors["record"][n]][start:].data
        array = np.ndarray(shape, kind, memory, 0, [step * kind.itemsize for step in tensors["stride"][n]])
        array = array.conj() if n in tensors["conj"] else array
        return -array if n in tensors["neg"] else array

    def value(node):
        tag, it, last = node[0], (node[1:2] or [None])[0], node[-1]
        if tag in ("dict", "ordered", "default"):
            return {value(key): value(item) for key, item in it}
        if tag in ("list", "tuple", "set", "size"):
            return {"list": list, "set": set}.get(tag, tuple)(it if tag == "size" else map(value, it))
        if tag in ("array", "blob", "object"):
            plain = tag == "array" and node[2][0] != "["  # structured arrays are left as bytes
            return records[it].view(node[2]).reshape(last) if plain else bytes(records[it])
        read = {
            "complex": lambda: complex(value(it), value(last)), "tensor": lambda: tensor(it),
            "int": lambda: int(it, 16) if type(it) is str else it, "bytes": lambda: base64.b64decode(it),
            "float": lambda: struct.unpack(">d", bytes.fromhex(it))[0] if type(it) is str else it,
            "str": lambda: bytes.fromhex(last).decode("utf-8", "surrogatepass") if it is None else it,
            "scalar": lambda: np.frombuffer(bytes.fromhex(last), it if it[0] != "[" else "u1")[0],
        }  # fmt: skip
        return read.get(tag, lambda: it)()

    return value(index["tree"])


if __name__ == "__main__":
    print(read(sys.argv[1], *map(int, sys.argv[2:])))
