//! The C interface of libibverbs and librdmacm: the only place that names `rdma-sys`.
//!
//! Everything above goes through the safe layer beside this file. `tests/rdma_layout.rs` compares
//! the structs that are used here with what the C compiler makes of the installed headers.

pub(super) use rdma_sys::{
    ibv_access_flags, ibv_ack_cq_events, ibv_alloc_mw, ibv_alloc_pd, ibv_comp_channel, ibv_context,
    ibv_cq, ibv_create_comp_channel, ibv_create_cq, ibv_dealloc_mw, ibv_dealloc_pd, ibv_dereg_mr,
    ibv_destroy_comp_channel, ibv_destroy_cq, ibv_device_attr, ibv_get_cq_event,
    ibv_get_device_name, ibv_inc_rkey, ibv_modify_qp, ibv_mr, ibv_mw, ibv_mw_bind_info,
    ibv_mw_type, ibv_pd, ibv_poll_cq, ibv_post_recv, ibv_post_send, ibv_qp, ibv_qp_attr,
    ibv_qp_attr_mask, ibv_qp_init_attr, ibv_qp_state, ibv_qp_type, ibv_query_device, ibv_recv_wr,
    ibv_reg_mr, ibv_req_notify_cq, ibv_send_flags, ibv_send_wr, ibv_sge, ibv_wc, ibv_wc_flags,
    ibv_wc_opcode, ibv_wc_status, ibv_wc_status_str, ibv_wr_opcode, rdma_accept, rdma_ack_cm_event,
    rdma_bind_addr, rdma_cm_event, rdma_cm_event_type, rdma_cm_id, rdma_conn_param, rdma_connect,
    rdma_create_event_channel, rdma_create_id, rdma_create_qp, rdma_destroy_event_channel,
    rdma_destroy_id, rdma_destroy_qp, rdma_disconnect, rdma_event_channel, rdma_event_str,
    rdma_get_cm_event, rdma_listen, rdma_migrate_id, rdma_port_space, rdma_reject,
    rdma_resolve_addr, rdma_resolve_route, rdma_set_option,
};
