"""This Triton Python model keeps the server's class sets.

A request lists the sets. Loading the model with a change in its config makes that change. If the load fails, it gives
the reason in one line and the sets stay as they were. Loading is Triton's model control, which `vilu serve` opens only
to callers with the control token. The model needs no torch and unpickles nothing.
"""

import base64
import binascii
import json
import os
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import class_names  # the export copies vilu/preprocess/class_names.py and sets.py beside this file
import numpy as np
import sets
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self.parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        labels = Path(args["model_repository"]) / args["model_version"] / "labels.txt"
        self.default = {
            "name": sets.DEFAULT,
            "version": int(args["model_version"]),
            "names": labels.read_text("utf-8").split("\n")[:-1],
            "templates": json.loads(self.parameters["templates"]),
            "threshold": float(self.parameters["threshold"]),
        }
        # The later stages of a cascade: fingerprint, dim and templates of each, and the model that embeds texts.
        self.stages = json.loads(self.parameters.get("stages", "[]"))
        self.folder = sets.folder_of(args)
        change = json.loads(self.parameters.get("change", "null"))
        try:
            if change is not None and "remove" in change:
                self._remove(change["remove"])
            elif change is not None:
                self._put(change)
        except sets.RequestError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        except OSError as error:
            message = f"{self.folder}: cannot be written ({error.strerror})"
            raise pb_utils.TritonModelException(f"{message}; start the server with VILU_CLASS_SETS=FOLDER") from None

    def _put(self, change: dict[str, Any]) -> None:
        name = self._name(change["put"])
        found = sets.versions(self.folder)
        most = int(self.parameters["max_class_sets"])
        if name not in sets.served(found) and len(sets.served(found)) >= most:
            raise sets.RequestError(f"class set {name}: the server has {most} sets, which is the limit")
        header, rows = self._check(name, change)
        data = json.dumps(header).encode() + b"\n" + b"".join(bank.astype("<f4").tobytes() for bank in rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        version = self._write(name, found, data, "")
        for number, path in sets.versions(self.folder)[name]:
            if number <= version - sets.KEPT or path.name.endswith(".removed"):
                path.unlink(missing_ok=True)
        pb_utils.Logger.log_info(f"class set {name}@{version}: {len(rows[0])} classes")

    def _remove(self, given: Any) -> None:
        name = self._name(given)
        found = sets.versions(self.folder)
        if name not in sets.served(found):
            raise sets.RequestError(f"class set {name} is not served")
        version = self._write(name, found, b"", ".removed")  # written first, so that later versions count on from it
        for _, path in found[name]:
            path.unlink(missing_ok=True)
        pb_utils.Logger.log_info(f"class set {name}@{version}: removed")

    def _name(self, name: Any) -> str:
        """Return the name if a set may have it; refuse any other."""
        if not isinstance(name, str) or not sets.NAME.fullmatch(name):
            raise sets.RequestError("a class set's name is 1 to 64 of a-z, 0-9, _ and -")
        if name in (sets.DEFAULT, sets.OPEN):
            raise sets.RequestError(f"class set {name}: this name is taken; `vilu export` writes the default set")
        return name

    def _write(self, name: str, found: dict[str, Any], data: bytes, suffix: str) -> int:
        """Write a new version's file, whole or not at all, and return the version. Servers may share the folder."""
        version: int = found[name][-1][0] if name in found else 0
        handle, part = tempfile.mkstemp(dir=self.folder, prefix=".part-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(part, 0o644)
            while True:
                version += 1
                try:
                    os.link(part, self.folder / f"{name}@{version}{suffix}")
                    return version
                except FileExistsError:
                    continue
        finally:
            os.unlink(part)

    def _check(self, name: str, change: dict[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Return the header and each stage's rows (K, D) float32 of a set that can be served; refuse any other."""

        def refuse(reason: str) -> NoReturn:
            raise sets.RequestError(f"class set {name}: {reason}")

        names: Any = change.get("names")
        templates, threshold = change.get("templates"), change.get("threshold")
        most, longest = int(self.parameters["max_classes"]), int(self.parameters["max_label_bytes"])
        if isinstance(names, list) and len(names) > most:
            refuse(f"{len(names)} class names, the limit is {most}")
        if problem := class_names.names_problem(names):
            refuse(problem)
        for number, label in enumerate(names, 1):
            if len(label.encode()) > longest:
                refuse(f"class name {number} has {len(label.encode())} bytes, the limit is {longest}")
        if threshold is not None and not (isinstance(threshold, int | float) and 0 <= threshold <= 1):
            refuse(f"threshold {threshold!r} is not between 0 and 1")
        if problem := class_names.templates_problem(templates):
            refuse(problem)
        mine, theirs = self.parameters["fingerprint"], change.get("fingerprint") or ""
        if mine and theirs not in ("", mine):  # the model of a head's embeddings is not known
            refuse(f"its embeddings are another CLIP's ({theirs[:12]}), this server's is {mine[:12]}")
        more = change.get("more") or []
        if not isinstance(more, list) or len(more) != len(self.stages):
            stages = len(self.stages) + 1
            refuse(f"this server needs the names embedded by {stages} CLIPs: give names, and a client of its version")
        rows = []
        dims = [int(self.parameters["dim"]), *(stage["dim"] for stage in self.stages)]
        for given, dim in zip([change.get("text_embeddings", ""), *more], dims, strict=True):
            try:
                data = base64.b64decode(given, validate=True)
            except (binascii.Error, TypeError, ValueError):
                refuse("its embeddings are not base64")
            if len(data) != 4 * dim * len(names):
                width = f"{len(data) / 4 / len(names):g}"
                refuse(f"{len(names)} names but embeddings of {width} numbers each, {dim} are needed")
            try:
                rows.append(sets.normalise(np.frombuffer(data, "<f4").reshape(len(names), dim), "text_embeddings"))
            except sets.RequestError as error:
                refuse(str(error))
            if problem := class_names.rows_problem(names, rows[-1]):
                refuse(problem)
        header = {"names": names, "templates": templates, "threshold": threshold, "fingerprint": mine}
        if self.stages:
            header["more"] = [{key: stage[key] for key in ("fingerprint", "dim")} for stage in self.stages]
        return header, rows

    def execute(self, requests: list[Any]) -> list[Any]:
        responses = []
        for request in requests:
            try:
                names = pb_utils.get_input_tensor_by_name(request, "NAME").as_numpy()
                listings = np.array([[self._list(name)] for name in names.reshape(-1)], object)
                responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("CLASS_SETS", listings)]))
            except Exception as error:
                responses.append(sets.error_response(error))
        return responses

    def _list(self, given: Any) -> bytes:
        """Return JSON that lists every set without its class names, or the one set asked for with its class names."""
        asked = given.decode("utf-8", "replace") if isinstance(given, bytes) else str(given)
        found = sets.versions(self.folder)
        there = [self.default]
        for name in sets.served(found):
            version, path = found[name][-1]
            try:
                header, _ = sets.read(path)
            except FileNotFoundError:
                continue  # another server replaced or removed it meanwhile
            except (OSError, ValueError) as error:
                pb_utils.Logger.log_warn(f"class set {name}: {path} cannot be read ({error})")
                continue
            if header["fingerprint"] == self.parameters["fingerprint"]:
                there.append(header | {"name": name, "version": version})
        if asked:
            there = [one for one in there if one["name"] == asked]
            if not there:
                raise sets.RequestError(f"class set {asked[:64]!r} is not served")
        out = []
        for one in there:
            names = one["names"] if asked else None
            threshold = self.default["threshold"] if one["threshold"] is None else one["threshold"]
            row = {"name": one["name"], "version": one["version"], "classes": len(one["names"]), "names": names}
            out.append(row | {"threshold": threshold, "templates": one["templates"]})
        listing = {"fingerprint": self.parameters["fingerprint"], "dim": int(self.parameters["dim"]), "sets": out}
        if self.stages:
            listing["stages"] = self.stages
        return json.dumps(listing).encode()
