"""Triton Python model: image embeddings to the answer, or to what lies behind it, over a class set that the server has.

It gives what its graphs give: vilu_head the answer, vilu_details the rest.
"""

import head  # copied beside this file by the export


class TritonPythonModel(head.Head):
    pass
