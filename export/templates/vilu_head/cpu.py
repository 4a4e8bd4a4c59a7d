"""Triton Python model: image embeddings to the answer or its details, over a class set that the server has.

Its graphs decide which: vilu_head gives the answer, vilu_details the details.
"""

import head  # copied beside this file by the export


class TritonPythonModel(head.Head):
    pass
