"""Read one rank's part of a Milepost checkpoint with nothing but numpy and the standard library.

Usage: python read_checkpoint.py CHECKPOINT [RANK]. See format.md; objects and attributes are left out.
"""

import base64, hashlib, json, struct, sys, zlib  # noqa: E401 - short on purpose
import numpy as np  # isort: skip

CHUNK = 262144
NUMPY = {"bfloat16": "<u2", "complex32": "<u4", "bool": "?"}  # bfloat16 as its bits


def expect(condition, message):
    if not condition:
        sys.exit(f"damaged: {message}")


def read(folder, rank=0):
    raw = open(f"{folder}/manifest.json", "rb").read()
    expect(raw[:11] == b'{"sha256":"' and raw[75:84] == b'","body":' and raw[-1:] == b"}", "manifest")
    expect(hashlib.sha256(raw[84:-1]).hexdigest().encode() == raw[11:75], "manifest")
    manifest = json.loads(raw[84:-1])
    expect(manifest["version"][0] == 1 and not manifest["requires"], "a later format")
    listed = manifest["indexes"][rank]
    raw = open(f"{folder}/index_{rank}.json", "rb").read()
    expect(hashlib.sha256(raw).hexdigest() == listed["sha256"], listed["name"])
    index = json.loads(raw)
    data = np.memmap(f"{folder}/{index['files'][0]['name']}", np.uint8, "r")
    expect(len(data) == index["files"][0]["size"], index["files"][0]["name"])
    records, tensors, crcs = index["records"], index["tensors"], iter(index["records"]["crcs"])
    spans = list(zip(records["offset"], records["length"]))
    for offset, length in spans:
        for start in range(offset, offset + length, CHUNK):
            chunk = data[start : min(start + CHUNK, offset + length)]
            expect(zlib.crc32(chunk) == next(crcs), f"bytes {start} to {start + len(chunk)}")

    def tensor(n):
        name = tensors["dtype"][n]
        kind = np.dtype(NUMPY.get(name, "u1" if name.startswith(("float8", "float4", "bits")) else name))
        offset, length = spans[tensors["record"][n]]
        start, shape = offset + tensors["byte_offset"][n], tensors["shape"][n]
        if 0 in shape:
            return np.zeros(shape, kind)
        steps = [step * kind.itemsize for step in tensors["stride"][n]]
        array = np.ndarray(shape, kind, data[start : offset + length], 0, steps)
        array = array.conj() if n in tensors["conj"] else array
        return -array if n in tensors["neg"] else array

    def value(node):
        tag, rest = node[0], node[1:]
        if tag in ("dict", "ordered", "default"):
            return {value(key): value(item) for key, item in rest[0]}
        if tag in ("list", "tuple", "set"):
            return {"list": list, "tuple": tuple, "set": set}[tag](map(value, rest[0]))
        if tag == "float" and isinstance(rest[0], str):
            return struct.unpack(">d", bytes.fromhex(rest[0]))[0]
        if tag == "scalar":
            return np.frombuffer(bytes.fromhex(rest[1]), np.dtype(rest[0]))[0]
        if tag in ("array", "blob", "object"):
            raw = data[spans[rest[0]][0] : sum(spans[rest[0]])]
            return raw.view(np.dtype(rest[1])).reshape(rest[2]) if tag == "array" else raw.tobytes()
        simple = {
            "none": lambda: None, "int": lambda: int(rest[0], 16) if isinstance(rest[0], str) else rest[0],
            "complex": lambda: complex(value(rest[0]), value(rest[1])), "bytes": lambda: base64.b64decode(rest[0]),
            "str": lambda: rest[0] if rest[0] is not None else bytes.fromhex(rest[1]).decode("utf-8", "surrogatepass"),
            "tensor": lambda: tensor(rest[0]), "size": lambda: tuple(rest[0]),
        }  # fmt: skip
        return simple.get(tag, lambda: rest[0])()

    return value(index["tree"])


if __name__ == "__main__":
    print(read(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0))
