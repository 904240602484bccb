//! The structures of `include/moepress.h`, which documents them.

#![allow(missing_docs, reason = "documented in the header")]

use std::ffi::c_void;

/// A structure of the header, with the names and places of its fields for the test that compares them.
macro_rules! mirror {
    ($($name:ident = $c_name:literal { $($field:ident: $type:ty,)* })*) => {
        $(
            #[doc = concat!("`", $c_name, "`.")]
            #[repr(C)]
            #[derive(Clone, Copy, Debug)]
            pub struct $name { $(pub $field: $type,)* }
        )*
        /// C name, size, fields and their places.
        #[doc(hidden)]
        pub const LAYOUT: &[(&str, usize, &[(&str, usize)])] = &[$((
            $c_name,
            size_of::<$name>(),
            &[$((stringify!($field), std::mem::offset_of!($name, $field)),)*],
        ),)*];
    };
}

mirror! {
    Matrix = "moepress_matrix" {
        form: i32,
        rank: i32,
        weight: *const c_void,
        weight_stride: i64,
        v: *const c_void,
        v_stride: i64,
        bias: *const f32,
        sparse_rows: *const i32,
        sparse: *const c_void,
        sparse_stride: i64,
        sparse_count: i32,
        reserved: i32,
    }
    Expert = "moepress_expert" {
        form: i32,
        width: i32,
        alias_of: i32,
        reserved: i32,
        constant: *const f32,
        gate: Matrix,
        up: Matrix,
        down: Matrix,
    }
    Router = "moepress_router" {
        struct_size: usize,
        scoring: i32,
        choice: i32,
        groups: i32,
        groups_kept: i32,
        groups_by_two: i32,
        renormalise: i32,
        scale: f32,
        added: f32,
        least: f32,
        sparse_mixer_threshold: f32,
        weight: *const f32,
        bias: *const f32,
        choice_bias: *const f32,
        group_of: *const i32,
        live: *const u8,
        skip_tail: f32,
        skip_keeps_weights: i32,
    }
    LayerSpec = "moepress_layer_spec" {
        struct_size: usize,
        hidden: i32,
        dtype: i32,
        location: i32,
        top_k: i32,
        experts_count: i32,
        activation: i32,
        limit: f32,
        slope: f32,
        weights_multiply_inputs: i32,
        expert_map_count: i32,
        expert_map: *const i32,
        experts: *const Expert,
        shared: *const Expert,
        shared_gate: *const f32,
        router: *const Router,
        bases: *const Matrix,
        base_width: i32,
        reserved: i32,
    }
    ForwardArgs = "moepress_forward_args" {
        struct_size: usize,
        tokens: i64,
        x: *const c_void,
        x_stride: i64,
        out: *mut c_void,
        out_stride: i64,
        residual: *const c_void,
        residual_stride: i64,
        routing: i32,
        reserved: i32,
        ids: *const i32,
        weights: *const f32,
        logits: *const f32,
        logits_stride: i64,
        workspace: *mut c_void,
        workspace_bytes: usize,
    }
}

/// `moepress_status`.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Ok = 0,
    InvalidArgument = 1,
    Unavailable = 2,
    DeviceError = 3,
    InternalError = 4,
}
