//! ptpd, as it is, told not to touch the clock, and what it writes of each message.

use std::path::Path;

/// The arguments of a ptpd that sends or follows on an interface, and leaves the clock alone. Its statistics go to a file.
pub fn arguments(role: Role, interface: &str, log_interval: i32, statistics: &Path) -> Vec<String> {
    let preset = match role {
        Role::Master => "masteronly",
        Role::Slave => "slaveonly",
    };
    let statistics = statistics.display();
    [
        format!("ptpengine:interface={interface}"),
        format!("ptpengine:preset={preset}"),
        format!("ptpengine:log_sync_interval={log_interval}"),
        format!("ptpengine:log_delayreq_interval={log_interval}"),
        format!("ptpengine:log_delayreq_interval_initial={log_interval}"),
        "ptpengine:log_delayreq_override=y".into(),
        // A master takes over when it has heard of no other for two of these.
        "ptpengine:log_announce_interval=-2".into(),
        "ptpengine:announce_receipt_timeout=2".into(),
        "clock:no_adjust=y".into(),
        "clock:no_reset=y".into(),
        "global:foreground=y".into(),
        // Several on one machine.
        "global:ignore_lock=y".into(),
        "global:use_syslog=n".into(),
        "global:log_statistics=y".into(),
        "global:statistics_log_interval=0".into(),
        "global:statistics_timestamp_format=unix".into(),
        format!("global:statistics_file={statistics}"),
    ]
    .map(|setting| format!("--{setting}"))
    .to_vec()
}

/// What a ptpd does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It has the time.
    Master,
    /// It wants to know it.
    Slave,
}

/// A message that the slave has received.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Record {
    /// When, ns since 1970.
    pub at_ns: u64,
    /// What it says.
    pub what: What,
}

/// What a message says, ns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// A Sync: the offset of the slave's clock from the master's, as ptpd computes it, and the time from the master's
    /// stamp to the slave's.
    Sync {
        /// Filtered: half of this message's and half of the one before, less ptpd's mean of the path.
        offset_ns: i64,
        /// As measured.
        down_ns: i64,
    },
    /// A delay response: the time from the slave's stamp to the master's.
    Delay {
        /// As measured.
        up_ns: i64,
    },
}

/// What a slave has written to its statistics file (ptpd 2.3.1, `logStatistics`): a line for each message, with fields
/// between commas. Lines of other states, and one that is not finished, are left out.
pub fn records(statistics: &str) -> impl Iterator<Item = Record> {
    let whole = statistics.rfind('\n').map_or("", |end| &statistics[..end]);
    whole.lines().filter_map(record)
}

fn record(line: &str) -> Option<Record> {
    const STATE: usize = 1;
    const OFFSET: usize = 4;
    const RECEIVED: usize = 8;
    const RAW_DOWN: usize = 15;
    const RAW_UP: usize = 16;
    let fields: Vec<&str> = line.split(',').map(str::trim).collect();
    if *fields.get(STATE)? != "slv" {
        return None;
    }
    let ns = |field: usize| nanoseconds(fields.get(field)?);
    let what = match *fields.get(RECEIVED)? {
        "S" => What::Sync { offset_ns: ns(OFFSET)?, down_ns: ns(RAW_DOWN)? },
        "D" => What::Delay { up_ns: ns(RAW_UP)? },
        _ => return None,
    };
    Some(Record { at_ns: ns(0)?.try_into().ok()?, what })
}

/// Seconds with nine digits behind the point.
fn nanoseconds(text: &str) -> Option<i64> {
    let (sign, digits) = text.strip_prefix('-').map_or((1, text), |digits| (-1, digits));
    let (seconds, nanoseconds) = digits.split_once('.')?;
    if nanoseconds.len() != 9 {
        return None;
    }
    let whole: i64 = seconds.parse().ok()?;
    Some(sign * (whole.checked_mul(1_000_000_000)? + nanoseconds.parse::<i64>().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# Timestamp, State, Clock ID, One Way Delay, Offset From Master, Slave to Master, ...\n\
        1795392448.430338468, init,\n\
        1795392448.530936258, lstn_init, 1 \n\
        1795392455.532102953, slv,020000fffe000701(unknown)/1,  0.0,  0.0,  0.0,  0.0, 0.0, I, 0.0, 0, 0.0, 0, 0, 0,  0.0,  0.0\n\
        1795392455.625259384, slv,020000fffe000701(unknown)/1,  0.000025741, -0.000008542,  0.000039559,  0.000016114, 0.000000000, S, 0.000000000, 0, 0.000000000, 0, 0, 0,  0.000016114,  0.000039559\n\
        1795392455.627363933, slv,020000fffe000701(unknown)/1,  0.000025058, -0.000008542,  0.000017596,  0.000016114, 0.000000000, D, 0.000000000, 0, 0.000000000, 0, 0, 0,  0.000016114,  0.000017596\n\
        1795392455.641081147, slv,020000fffe000701(unknown)/1,  0.000025058,  0.000002693,  0.000017596,  0.000040070, 0.000000000, S, 0.000000000, 0, 0.000000000, 0, 0, 0,  0.0000";

    #[test]
    fn reads_what_ptpd_writes_and_leaves_out_the_line_that_is_not_finished() {
        let expected = [
            Record { at_ns: 1_795_392_455_625_259_384, what: What::Sync { offset_ns: -8_542, down_ns: 16_114 } },
            Record { at_ns: 1_795_392_455_627_363_933, what: What::Delay { up_ns: 17_596 } },
        ];
        assert_eq!(records(TEXT).collect::<Vec<_>>(), expected);
        assert_eq!(records("").count(), 0);
    }

    #[test]
    fn seconds_become_nanoseconds_with_their_sign() {
        for (text, ns) in [
            ("0.000000001", Some(1)),
            ("-0.000000001", Some(-1)),
            ("1.500000000", Some(1_500_000_000)),
            ("1.5", None),
            ("1", None),
            ("x.000000000", None),
            ("99999999999999999999.000000000", None),
        ] {
            assert_eq!(nanoseconds(text), ns, "{text}");
        }
    }

    #[test]
    fn no_ptpd_touches_the_clock() {
        for role in [Role::Master, Role::Slave] {
            let arguments = arguments(role, "eth0", -6, Path::new("/tmp/x"));
            assert!(arguments.iter().any(|argument| argument == "--clock:no_adjust=y"));
            assert!(arguments.iter().any(|argument| argument == "--clock:no_reset=y"));
            assert!(arguments.iter().any(|argument| argument == "--ptpengine:log_sync_interval=-6"));
        }
    }
}
