"""XLA's protos of a compiled program: the fields that a plan reads, with their numbers.

From hlo.proto and xla_data.proto of https://github.com/openxla/xla; a number keeps its meaning in
all versions. TensorFlow has the protos whole (tensorflow.compiler.xla.service.hlo_pb2), but takes
seconds to import and drops what compilers newer than itself write, such as `MeshProto.iota`.
"""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

Proto: TypeAlias = Any  # a message, whose class is made at run time

# NAME=NUMBER, an integer unless :TYPE follows, repeated where a * does. Enums are integers, the
# entries of maps are messages.
_MESSAGES = {
    "HloProto": "hlo_module=1:HloModuleProto buffer_assignment=3:BufferAssignmentProto",
    "HloModuleProto": """entry_computation_name=2:string computations=3:HloComputationProto*
        schedule=7:HloScheduleProto stack_frame_index=17:StackFrameIndexProto""",
    "HloComputationProto": "name=1:string instructions=2:HloInstructionProto* id=5 root_id=6",
    "HloInstructionProto": """name=1:string opcode=2:string shape=3:ShapeProto metadata=7:OpMetadata
        literal=8:LiteralProto parameter_number=9 tuple_index=13 window=15:Window
        convolution_dimension_numbers=16:ConvolutionDimensionNumbers custom_call_target=28:string
        dot_dimension_numbers=30:DotDimensionNumbers id=35 operand_ids=36*
        called_computation_ids=38* backend_config=43:bytes replica_groups=49:ReplicaGroup*
        source_target_pairs=52:SourceTarget* batch_group_count=58 comparison_direction=63:string
        frontend_attributes=68:FrontendAttributes
        collective_device_list=87:CollectiveDeviceListProto
        iota_collective_device_list=92:IotaReplicaGroupListProto
        mesh_axes_replica_group_list=93:MeshAxesReplicaGroupListProto""",
    "ShapeProto": "element_type=2 dimensions=3* tuple_shapes=4:ShapeProto* layout=5:LayoutProto",
    "LayoutProto": "memory_space=8",
    "OpMetadata": "op_name=2:string stack_frame_id=15",
    "LiteralProto": "s32s=4* s64s=5* u32s=6* u64s=7*",
    "Window": "dimensions=1:WindowDimension*",
    "WindowDimension": "stride=2 padding_low=3 window_dilation=5 base_dilation=6",
    "ConvolutionDimensionNumbers": """kernel_input_feature_dimension=3
        kernel_output_feature_dimension=4 kernel_spatial_dimensions=6* input_batch_dimension=7
        input_spatial_dimensions=11* output_spatial_dimensions=12*""",
    "DotDimensionNumbers": "lhs_contracting_dimensions=1*",
    "SourceTarget": "source=1 target=2",
    "FrontendAttributes": "map=1:MapEntry*",
    "MapEntry": "key=1:string value=2:string",
    "ReplicaGroup": "replica_ids=1*",
    "CollectiveDeviceListProto": """replica_groups=1:ReplicaGroup*
        iota_replica_group_list=2:IotaReplicaGroupListProto""",
    "IotaReplicaGroupListProto": """num_devices_per_group=2 iota_reshape_dims=3*
        iota_transpose_perm=4*""",
    "MeshAxesReplicaGroupListProto": "mesh=1:MeshProto axes=2:AxisRefProto*",
    "MeshProto": "axes=1:MeshAxis* device_ids=2* iota=3:Iota",
    "MeshAxis": "name=1:string size=2",
    "Iota": "reshape_dims=1* transpose_perm=2*",
    "AxisRefProto": "mesh_axis_index=1 sub_axis_info=2:SubAxis",
    "SubAxis": "pre_size=1 size=2",
    "HloScheduleProto": "sequences=1:SequencesEntry*",
    "SequencesEntry": "key=1 value=2:InstructionSequence",
    "InstructionSequence": "instruction_ids=1*",
    "StackFrameIndexProto": """file_names=1:string* file_locations=3:FileLocation*
        stack_frames=4:StackFrame*""",
    "FileLocation": "file_name_id=1 line=3",
    "StackFrame": "file_location_id=1 parent_frame_id=2",
    "BufferAssignmentProto": """logical_buffers=1:LogicalBufferProto*
        buffer_allocations=3:BufferAllocationProto* heap_simulator_traces=4:HeapSimulatorTrace*""",
    "LogicalBufferProto": "id=1 defined_at=3:Location",
    "Location": "shape_index=3* instruction_id=4",
    "BufferAllocationProto": """size=2 is_thread_local=3 is_entry_computation_parameter=5
        parameter_number=6 maybe_live_out=7 color=8 assigned=9:Assigned* is_constant=12""",
    "Assigned": "logical_buffer_id=1 offset=2 size=3",
    "HeapSimulatorTrace": "events=1:Event*",
    "Event": "kind=1 buffer_id=2 instruction_name=4:string",
}
FREE = 1  # of Event.kind

_DTYPES = """invalid pred s8 s16 s32 s64 u8 u16 u32 u64 f16 f32 f64 tuple opaque c64 bf16 token c128
f8e5m2 f8e4m3fn s4 u4 f8e4m3b11fnuz f8e5m2fnuz f8e4m3fnuz s2 u2 f8e4m3 f8e3m4 s1 u1 f4e2m1fn
f8e8m0fnu buffer"""
DTYPES = _DTYPES.split()  # names of PrimitiveType in the order of their numbers


@functools.cache
def message(name: str) -> Proto:
    """The class of a message."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"lm.xla.{name}"))


@functools.cache
def _pool() -> descriptor_pool.DescriptorPool:
    """A pool of its own: TensorFlow's would have other messages of these names."""
    file = descriptor_pb2.FileDescriptorProto(name="xla", package="lm.xla", syntax="proto3")
    for name, fields in _MESSAGES.items():
        described = file.message_type.add(name=name)
        for field in fields.split():
            key, _, kind = field.rstrip("*").partition(":")
            field_name, _, number = key.partition("=")
            added = described.field.add(name=field_name, number=int(number))
            added.label = added.LABEL_REPEATED if field.endswith("*") else added.LABEL_OPTIONAL
            if kind in _MESSAGES:
                added.type, added.type_name = added.TYPE_MESSAGE, f".lm.xla.{kind}"
            else:
                added.type = getattr(added, f"TYPE_{(kind or 'int64').upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool
