//! The C interface of libibverbs and librdmacm: the only place that names `rdma-sys`.
//!
//! Everything above goes through the safe layer beside this file. The test below compares structs
//! and constants with what the C compiler makes of the installed headers: some of them `rdma-sys`
//! wrote by hand, as its generator can't express their unions.

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

/// `RDMA_OPTION_ID` and `RDMA_OPTION_ID_ACK_TIMEOUT` of rdma/rdma_cma.h: the bindings leave out
/// anonymous enumerations.
pub(super) const RDMA_OPTION_ID: i32 = 0;
pub(super) const RDMA_OPTION_ID_ACK_TIMEOUT: i32 = 3;

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;
    use std::io::Write as _;
    use std::mem::offset_of;
    use std::process::{Command, Stdio};

    use super::*;

    /// What one side says, as lines of a C program that prints it, and as what it should print.
    #[derive(Default)]
    struct Comparison {
        program: String,
        expected: String,
    }

    impl Comparison {
        fn add(&mut self, expression: &str, value: u64) {
            writeln!(
                self.program,
                "printf(\"%s %llu\\n\", \"{expression}\", (unsigned long long)({expression}));"
            )
            .expect("a string");
            writeln!(self.expected, "{expression} {value}").expect("a string");
        }
    }

    macro_rules! structs {
        ($to:ident: $($name:ident { $($c:literal = $($field:ident).+),* $(,)? })*) => {
            $(
                $to.add(
                    concat!("sizeof(struct ", stringify!($name), ")"),
                    size_of::<$name>() as u64,
                );
                $(
                    $to.add(
                        concat!("offsetof(struct ", stringify!($name), ", ", $c, ")"),
                        offset_of!($name, $($field).+) as u64,
                    );
                )*
            )*
        };
    }

    macro_rules! constants {
        ($to:ident: $($name:ident = $value:expr),* $(,)?) => {
            $($to.add(stringify!($name), $value as u64);)*
        };
    }

    #[test]
    fn structs_and_constants_are_those_of_the_installed_headers() {
        let mut all = Comparison::default();
        structs!(all:
            ibv_send_wr {
                "wr_id" = wr_id, "next" = next, "sg_list" = sg_list, "num_sge" = num_sge,
                "opcode" = opcode, "send_flags" = send_flags,
                "invalidate_rkey" = imm_data_invalidated_rkey_union,
                "wr.rdma.remote_addr" = wr.rdma.remote_addr, "wr.rdma.rkey" = wr.rdma.rkey,
                "bind_mw.mw" = bind_mw_tso_union.bind_mw.mw,
                "bind_mw.rkey" = bind_mw_tso_union.bind_mw.rkey,
                "bind_mw.bind_info" = bind_mw_tso_union.bind_mw.bind_info,
            }
            ibv_recv_wr {
                "wr_id" = wr_id, "next" = next, "sg_list" = sg_list, "num_sge" = num_sge,
            }
            ibv_sge { "addr" = addr, "length" = length, "lkey" = lkey }
            ibv_wc {
                "wr_id" = wr_id, "status" = status, "opcode" = opcode, "byte_len" = byte_len,
                "invalidated_rkey" = imm_data_invalidated_rkey_union, "wc_flags" = wc_flags,
            }
            ibv_qp_init_attr {
                "send_cq" = send_cq, "recv_cq" = recv_cq, "cap.max_send_wr" = cap.max_send_wr,
                "cap.max_recv_wr" = cap.max_recv_wr, "cap.max_send_sge" = cap.max_send_sge,
                "cap.max_recv_sge" = cap.max_recv_sge,
                "cap.max_inline_data" = cap.max_inline_data, "qp_type" = qp_type,
            }
            ibv_qp_attr { "qp_state" = qp_state, "min_rnr_timer" = min_rnr_timer }
            ibv_mr { "addr" = addr, "length" = length, "lkey" = lkey, "rkey" = rkey }
            ibv_mw { "rkey" = rkey, "type" = type_ }
            ibv_mw_bind_info {
                "mr" = mr, "addr" = addr, "length" = length, "mw_access_flags" = mw_access_flags,
            }
            ibv_device_attr { "vendor_id" = vendor_id }
            ibv_comp_channel { "fd" = fd }
            rdma_event_channel { "fd" = fd }
            rdma_cm_id {
                "verbs" = verbs, "qp" = qp, "route.addr.dst_addr" = route.addr.dst_addr_union,
            }
            rdma_cm_event {
                "id" = id, "event" = event, "status" = status,
                "param.conn.private_data" = param.conn.private_data,
                "param.conn.private_data_len" = param.conn.private_data_len,
            }
            rdma_conn_param {
                "private_data" = private_data, "private_data_len" = private_data_len,
                "retry_count" = retry_count, "rnr_retry_count" = rnr_retry_count,
            }
        );
        constants!(all:
            IBV_WR_RDMA_WRITE = ibv_wr_opcode::IBV_WR_RDMA_WRITE,
            IBV_WR_SEND_WITH_INV = ibv_wr_opcode::IBV_WR_SEND_WITH_INV,
            IBV_WR_BIND_MW = ibv_wr_opcode::IBV_WR_BIND_MW,
            IBV_WC_RECV = ibv_wc_opcode::IBV_WC_RECV,
            IBV_WC_WITH_INV = ibv_wc_flags::IBV_WC_WITH_INV.0,
            IBV_SEND_SIGNALED = ibv_send_flags::IBV_SEND_SIGNALED.0,
            IBV_SEND_INLINE = ibv_send_flags::IBV_SEND_INLINE.0,
            IBV_ACCESS_LOCAL_WRITE = ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0,
            IBV_ACCESS_REMOTE_WRITE = ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0,
            IBV_ACCESS_MW_BIND = ibv_access_flags::IBV_ACCESS_MW_BIND.0,
            IBV_MW_TYPE_2 = ibv_mw_type::IBV_MW_TYPE_2,
            IBV_QPT_RC = ibv_qp_type::IBV_QPT_RC,
            IBV_QPS_RTS = ibv_qp_state::IBV_QPS_RTS,
            IBV_QPS_ERR = ibv_qp_state::IBV_QPS_ERR,
            IBV_QP_STATE = ibv_qp_attr_mask::IBV_QP_STATE.0,
            IBV_QP_MIN_RNR_TIMER = ibv_qp_attr_mask::IBV_QP_MIN_RNR_TIMER.0,
            RDMA_PS_TCP = rdma_port_space::RDMA_PS_TCP,
            RDMA_OPTION_ID = RDMA_OPTION_ID,
            RDMA_OPTION_ID_ACK_TIMEOUT = RDMA_OPTION_ID_ACK_TIMEOUT,
            RDMA_CM_EVENT_ESTABLISHED = rdma_cm_event_type::RDMA_CM_EVENT_ESTABLISHED,
            RDMA_CM_EVENT_DISCONNECTED = rdma_cm_event_type::RDMA_CM_EVENT_DISCONNECTED,
            RDMA_CM_EVENT_TIMEWAIT_EXIT = rdma_cm_event_type::RDMA_CM_EVENT_TIMEWAIT_EXIT,
        );
        assert_eq!(said_by_c(&all.program), all.expected);
    }

    /// What a C program with this body prints.
    fn said_by_c(body: &str) -> String {
        let program = std::env::temp_dir().join(format!("curling-layout-{}", std::process::id()));
        let mut compiler = Command::new("cc")
            .args(["-x", "c", "-", "-o"])
            .arg(&program)
            .stdin(Stdio::piped())
            .spawn()
            .expect("a C compiler: install gcc");
        let mut source = compiler.stdin.take().expect("it was asked for");
        writeln!(
            source,
            "#include <stddef.h>\n#include <stdio.h>\n#include <rdma/rdma_cma.h>\n\
             int main(void) {{\n{body}return 0;\n}}"
        )
        .expect("the compiler reads");
        drop(source);
        assert!(compiler.wait().expect("wait").success(), "{body}");
        let output = Command::new(&program).output();
        std::fs::remove_file(&program).expect("it was just made");
        String::from_utf8(output.expect("it runs").stdout).expect("ASCII")
    }
}
