//! `qjump switch-config`: what it prints can be given to a switch, and a switch that gets it serves levels apart.

use std::{
    io::Write,
    process::{Command, Output, Stdio},
};

use anyhow::{Context, Result};
use qjump::{
    testbed::{Queueing, Rack, RackSpec},
    units::Rate,
};
use qjump_tests::{
    link::{PLAN, binary, failed, succeeded},
    measuring::{Server, qjump},
};
use serde_json::{Value, json};

fn switch_config(arguments: &[&str]) -> Result<Output> {
    Ok(Command::new(binary()).arg("switch-config").args(arguments).output()?)
}

fn with_plan<'a>(arguments: &[&'a str]) -> Vec<&'a str> {
    [arguments, &PLAN].concat()
}

#[test]
fn the_one_for_linux_makes_a_switch_serve_levels_apart() -> Result<()> {
    let rack = Rack::up(RackSpec::star(2, Rate::from_bps(100_000_000), 64 * 1024))?;
    rack.set_queueing(Queueing::Fifo)?;
    let server = Server::new(Some(rack.host(1)))?;
    let target = server.at(&rack.address(1));
    let check = || {
        let arguments = ["measure", "switch-check", &target, "--rate", "130mbit", "--level", "0,4,7", "--step", "1s"];
        qjump(Some(rack.host(0)), &[&arguments[..], &["--quiet", "--json", "-"]].concat()).output()
    };
    // Without it: one queue.
    let document: Value = serde_json::from_slice(&check()?.stdout)?;
    assert_eq!(document["setting"]["queues"], json!(["0+4+7"]), "{}", document["notes"]);

    let plan = [
        "--hosts",
        "2",
        "--link-rate",
        "100mbit",
        "--max-packet",
        "256",
        "--epsilon",
        "1ms",
        "--level",
        "7:1",
        "--level",
        "4:2",
    ];
    let script = succeeded(&switch_config(&[&["--nos", "linux", "--ports", "p1,p2"][..], &plan].concat())?)?;
    let (leaf, _) = rack.find("leaf1")?;
    // Again: it replaces what it has set up itself.
    for _ in 0..2 {
        let mut shell = leaf.command("sh").stdin(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        shell.stdin.take().context("no stdin")?.write_all(script.as_bytes())?;
        succeeded(&shell.wait_with_output()?)?;
    }
    let document: Value = serde_json::from_str(&succeeded(&check()?)?)?;
    assert_eq!(document["setting"]["queues"], json!(["0", "4", "7"]), "{}", document["notes"]);
    Ok(())
}

#[test]
fn standard_output_is_for_the_switch_alone() -> Result<()> {
    let output = switch_config(&with_plan(&["--nos", "sonic", "--ports", "Ethernet0,Ethernet4"]))?;
    let json: Value = serde_json::from_str(&succeeded(&output)?)?;
    assert_eq!(json["DSCP_TO_TC_MAP"]["QJUMP"]["56"], "7");
    assert_eq!(json["DSCP_TO_TC_MAP"]["QJUMP"]["40"], "5");
    for port in ["Ethernet0", "Ethernet4"] {
        assert_eq!(
            json["SCHEDULER"][json["QUEUE"][format!("{port}|7")]["scheduler"].as_str().context("one")?]["type"],
            "STRICT"
        );
        assert_eq!(json["PORT_QOS_MAP"][port]["dscp_to_tc_map"], "QJUMP");
    }
    let notes = String::from_utf8(output.stderr)?;
    assert!(notes.contains("Factory: queue 1: levels 7, 5 and 0"), "{notes}");
    let alone = succeeded(&switch_config(&with_plan(&["--nos", "sonic", "--ports", "Ethernet0", "--notes"]))?)?;
    assert!(alone.contains("Factory: ") && !alone.contains('{'), "{alone}");
    for nos in ["eos", "cumulus"] {
        let output = switch_config(&with_plan(&["--nos", nos]))?;
        assert!(output.stderr.is_empty() && succeeded(&output)?.contains("Factory: "), "{nos}");
    }
    Ok(())
}

/// A file of applications says the levels, too.
#[test]
fn a_configuration_file_does_as_well() -> Result<()> {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/apps.toml");
    let text = succeeded(&switch_config(&["--nos", "eos", "--ports", "Ethernet1-48", "--config", file])?)?;
    assert!(text.contains("levels 7, 6, 5 and 4") && text.contains("interface Ethernet1-48"), "{text}");
    Ok(())
}

#[test]
fn mistakes_are_refused() -> Result<()> {
    for (arguments, part) in [
        (with_plan(&["--nos", "sonic"]), "--ports Ethernet0,Ethernet4"),
        (with_plan(&["--nos", "linux"]), "--ports swp1,swp2"),
        (with_plan(&["--nos", "linux", "--ports", "a;reboot"]), "cannot be the name of a port"),
        (with_plan(&["--nos", "ios"]), "invalid value 'ios'"),
        (vec!["--nos", "eos"], "--config"),
        (vec!["--nos", "eos", "--config", "/nowhere.toml"], "cannot read"),
    ] {
        let (status, message) = failed(&switch_config(&arguments)?);
        assert!(status == 64 && message.contains(part), "{arguments:?}: {message}");
    }
    Ok(())
}
