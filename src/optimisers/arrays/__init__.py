"""Array functions on whatever array comes: NumPy or torch, and Python numbers where a rule computes with scalars.

Dispatch is by type. torch is never imported here: if an array is a tensor, torch is there already.
"""

from ._elementwise import abs2 as abs2
from ._elementwise import absolute as absolute
from ._elementwise import clip as clip
from ._elementwise import full_like as full_like
from ._elementwise import maximum as maximum
from ._elementwise import minimum as minimum
from ._elementwise import sign as sign
from ._elementwise import sqrt as sqrt
from ._elementwise import where as where
from ._elementwise import zero_norm as zero_norm
from ._elementwise import zeros as zeros
from ._elementwise import zeros_like as zeros_like
from ._host import address as address
from ._host import can_read as can_read
from ._host import copied as copied
from ._host import detached as detached
from ._host import host_int as host_int
from ._host import is_compiling as is_compiling
from ._host import is_concrete as is_concrete
from ._host import memory_key as memory_key
from ._host import read_int as read_int
from ._host import recording as recording
from ._host import share_memory as share_memory
from ._kinds import FLOATS as FLOATS
from ._kinds import HALF as HALF
from ._kinds import Array as Array
from ._kinds import as_array as as_array
from ._kinds import as_dtype_name as as_dtype_name
from ._kinds import cast_to as cast_to
from ._kinds import dtype_name as dtype_name
from ._kinds import element_count as element_count
from ._kinds import is_complex as is_complex
from ._kinds import is_inexact as is_inexact
from ._kinds import is_number as is_number
from ._kinds import kind as kind
from ._kinds import namespace as namespace
from ._kinds import real_dtype as real_dtype
from ._kinds import torch_if_loaded as torch_if_loaded
from ._kinds import working_dtype as working_dtype
from ._matrices import add_matmul as add_matmul
from ._matrices import identity_like as identity_like
from ._matrices import matmul as matmul
from ._matrices import matrix_norm as matrix_norm
from ._matrices import quick_in_bfloat16 as quick_in_bfloat16
from ._random import normal as normal
from ._random import random_bits as random_bits
from ._random import rounded_at_random as rounded_at_random
from ._reductions import concatenate as concatenate
from ._reductions import count_nonfinite as count_nonfinite
from ._reductions import norm as norm
from ._reductions import scalar_like as scalar_like
from ._reductions import stack as stack
from ._reductions import sum_over as sum_over
