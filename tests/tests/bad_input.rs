//! Mistakes: each gets one clear error, the right exit status, and changes nothing.

use std::{
    fs,
    os::unix::process::CommandExt,
    process::{Command, Output},
};

use anyhow::Result;
use qjump_tests::link::{Link, PLAN, binary, failed};

fn check(output: &Output, status: i32, parts: &[&str]) {
    let (code, error) = failed(output);
    assert_eq!(code, status, "{error}");
    for part in parts {
        assert!(error.contains(part), "'{part}' is missing in: {error}");
    }
    assert!(!error.contains("panicked"), "{error}");
}

fn plan_with(from: &str, to: &str) -> Vec<String> {
    PLAN.iter().map(|&word| if word == from { to.to_owned() } else { word.to_owned() }).collect()
}

#[test]
fn wrong_numbers_are_usage_errors_that_name_the_flag() -> Result<()> {
    for (from, to, parts) in [
        ("7:1", "8:1", vec!["--level", "no level '8'"]),
        ("7:1", "0:1", vec!["level 0 is best effort"]),
        ("7:1", "7:0", vec!["--level", "above 0"]),
        ("7:1", "7:nan", vec!["--level", "above 0"]),
        ("7:1", "7:-3", vec!["--level", "above 0"]),
        ("5:4", "7:2", vec!["level 7 is given twice"]),
        ("5:4", "5:1000", vec!["the largest factor that fits"]),
        ("5:4", "5:11gbit", vec!["level 5: its rate of 11gbit is more than the link's 10gbit"]),
        ("12", "0", vec!["hosts is 0"]),
        ("12", "-1", vec!["--hosts", "-1 is not in"]),
        ("12", "99999999999", vec!["--hosts", "not in"]),
        ("10gbit", "0gbit", vec!["--link-rate", "above 0"]),
        ("10gbit", "10", vec!["--link-rate", "no unit"]),
        ("10gbit", "10gbps", vec!["--link-rate", "bytes to tc"]),
        ("10gbit", "nangbit", vec!["--link-rate"]),
        ("256", "5", vec!["max-packet is 5 bytes"]),
        ("256", "99999999999", vec!["--max-packet"]),
        ("256", "-1", vec!["--max-packet", "plain number of bytes"]),
        ("256", "256B", vec!["--max-packet", "plain number of bytes"]),
        ("4us", "forever", vec!["--epsilon"]),
        ("4us", "-4us", vec!["--epsilon", "not below 0"]),
        ("4us", "99999s", vec!["too long to count"]),
    ] {
        for command in ["plan", "load"] {
            let mut arguments = vec![command.to_owned()];
            if command == "load" {
                arguments.extend(["--interface".to_owned(), "qjnone".to_owned()]);
            }
            arguments.extend(plan_with(from, to));
            check(&Command::new(binary()).args(&arguments).output()?, 64, &parts);
        }
    }
    Ok(())
}

#[test]
fn missing_and_mixed_arguments() -> Result<()> {
    let run = |arguments: &[&str]| Command::new(binary()).args(arguments).output();
    check(&run(&["plan"])?, 64, &["--config", "--hosts"]);
    check(&run(&["plan", "--hosts", "3"])?, 64, &["--link-rate"]);
    check(&run(&["load", "--config", "/nonexistent.toml"])?, 64, &["/nonexistent.toml", "No such file"]);
    check(&run(&["unload"])?, 64, &["--interface"]);
    check(&run(&["status", "--interface", "qjnone"])?, 2, &["not loaded", "qjump status"]);
    check(&run(&["laod"])?, 64, &["load"]);
    let mut no_interface = vec!["load"];
    no_interface.extend(PLAN);
    check(&run(&no_interface)?, 64, &["--interface"]);
    let mut no_device = vec!["load", "--interface", "qjnone"];
    no_device.extend(PLAN);
    check(&run(&no_device)?, 1, &["no interface 'qjnone'", "ip link"]);
    let mut long = vec!["load", "--interface", "a-name-that-is-far-too-long-for-linux"];
    long.extend(PLAN);
    check(&run(&long)?, 64, &["cannot be the name"]);
    // Names that would lead out of the directory of pins.
    for name in ["", "/tmp", "../..", ".", "a b"] {
        for command in ["unload", "status"] {
            check(&run(&[command, "--interface", name])?, 64, &["cannot be the name of an interface"]);
        }
    }
    let mut loopback = vec!["load", "--interface", "lo"];
    loopback.extend(PLAN);
    check(&run(&loopback)?, 64, &["loopback"]);
    Ok(())
}

#[test]
fn files_are_shown_with_line_and_caret() -> Result<()> {
    let directory = std::env::temp_dir().join(format!("qjump-bad-{}", std::process::id()));
    fs::create_dir_all(&directory)?;
    let file = directory.join("qjump.toml");
    let good = "[cluster]\nhosts = 12\nlink-rate = \"10gbit\"\nmax-packet = 256\nepsilon = \"4us\"\n\n[[level]]\nlevel = 7\nfactor = 1\n";
    let run = |text: &str| {
        fs::write(&file, text)?;
        Command::new(binary()).args(["plan", "--config"]).arg(&file).output()
    };
    assert!(run(good)?.status.success());
    for (from, to, parts) in [
        ("hosts = 12", "hosts = 0", vec!["qjump.toml", "line 2", "^", "at least 1"]),
        ("max-packet = 256", "max-packet = 5", vec!["qjump.toml: error at line 1", "^", "max-packet is 5"]),
        ("hosts = 12", "hosts = 1.5", vec!["line 2", "^"]),
        ("hosts = 12\n", "", vec!["line 1", "hosts"]),
        ("10gbit", "10gb", vec!["line 3", "^", "'gb'"]),
        ("epsilon", "epsilom", vec!["line 5", "^", "epsilom", "epsilon"]),
        ("level = 7", "level = 9", vec!["line 8", "^", "no level 9"]),
        ("level = 7", "level = \"7\"", vec!["line 8", "^", "a number from 0 to 7, without quotes"]),
        ("factor = 1", "factor = 0", vec!["line 9", "^", "factor is 0"]),
        ("factor = 1", "factor = nan", vec!["line 9", "^", "NaN"]),
        ("factor = 1", "factor = \"much\"", vec!["line 9", "^", "much"]),
        ("factor = 1", "factor = true", vec!["line 9", "^", "unlimited"]),
        (
            "factor = 1",
            "factor = 4\ntolerance = \"1us\"",
            vec!["qjump.toml: error at line 7", "^", "level 7: a tolerance is for"],
        ),
        ("[cluster]", "[cluster", vec!["line 1", "^"]),
        ("[[level]]\nlevel = 7\nfactor = 1\n", "", vec!["no level"]),
    ] {
        check(&run(&good.replace(from, to))?, 64, &parts);
    }
    check(&run("")?, 64, &["cluster"]);
    fs::write(&file, [0xff, 0xfe, 0x00])?;
    check(&Command::new(binary()).args(["plan", "--config"]).arg(&file).output()?, 64, &["UTF-8"]);
    fs::remove_dir_all(directory)?;
    Ok(())
}

#[test]
fn simulations_refuse_what_makes_no_sense() -> Result<()> {
    let directory = std::env::temp_dir().join(format!("qjump-bad-sim-{}", std::process::id()));
    fs::create_dir_all(&directory)?;
    let (trace, output) = (directory.join("trace.csv"), directory.join("out.svg"));
    let run =
        |more: &[&str]| Command::new(binary()).arg("sim").args(PLAN).arg("--svg").arg(&output).args(more).output();
    for (more, parts) in [
        (vec!["--topology", "ring:5"], vec!["--topology", "star:HOSTS"]),
        (vec!["--topology", "star:13"], vec!["13 hosts", "the plan 12"]),
        (vec!["--load", "poisson:2"], vec!["--load", "at most 1"]),
        (vec!["--epochs", "0"], vec!["--epochs"]),
        (vec!["--drift", "-1"], vec!["--drift"]),
        (vec!["--best-effort", "0.5"], vec!["--buffer"]),
        (vec!["--trace", "/nonexistent.csv"], vec!["/nonexistent.csv", "No such file"]),
        (vec!["--topology", "leaf-spine:2x5x1"], vec!["epsilon 4us is less than", "--hops 3"]),
    ] {
        check(&run(&more)?, 64, &parts);
    }
    for (text, parts) in [
        ("", vec!["trace.csv", "empty"]),
        ("0us,0,1,7,64\n0us,0,12,7,64\n", vec!["line 2", "^", "from 0 to 11"]),
        ("5us,0,1,7,64\n1us,0,1,7,64\n", vec!["line 2", "^", "ascend"]),
    ] {
        fs::write(&trace, text)?;
        check(&run(&["--trace", &trace.to_string_lossy()])?, 64, &parts);
    }
    fs::write(&trace, [0xff, 0xfe])?;
    check(&run(&["--trace", &trace.to_string_lossy()])?, 64, &["UTF-8"]);
    assert!(!output.exists(), "nothing was written");
    // And what does makes sense.
    fs::write(&trace, "0us,0,11,7,256\n0us,1,11,7,256\n")?;
    let good = run(&["--trace", &trace.to_string_lossy(), "--json"])?;
    assert!(good.status.success(), "{good:?}");
    let report: serde_json::Value = serde_json::from_slice(&good.stdout)?;
    assert_eq!(report["levels"][0]["delivered"], 2);
    assert!(fs::read_to_string(&output)?.contains("level 7"));
    fs::remove_dir_all(directory)?;
    Ok(())
}

#[test]
fn what_an_interface_cannot_carry_changes_nothing() -> Result<()> {
    let link = Link::new()?;
    let before = link.tc_state()?;
    let load = |more: &[&str], plan: &[String]| {
        let mut arguments: Vec<&str> = vec!["load", "--interface", &link.device];
        arguments.extend(more);
        arguments.extend(plan.iter().map(String::as_str));
        link.qjump(&arguments)
    };
    let plan = plan_with("", "");
    check(&load(&[], &plan_with("256", "1515"))?, 64, &["1515 bytes", "MTU of 1500", "ip link set dev"]);
    check(&load(&["--interface", &link.device], &plan)?, 64, &["given twice"]);
    check(&load(&["--interface", "qjnone"], &plan)?, 1, &["no interface 'qjnone'"]);
    check(&load(&["--hook", "xdp"], &plan)?, 64, &["--hook", "tcx", "clsact"]);
    assert!(!link.pins().exist());
    assert_eq!(link.tc_state()?, before);
    // A plan that does not hold leaves the one in force alone.
    link.load(&[])?;
    check(&load(&[], &plan_with("5:4", "5:1000"))?, 64, &["the largest factor"]);
    let status = link.status()?;
    assert_eq!((&status["generation"], &status["attached"]), (&1.into(), &true.into()));
    Ok(())
}

#[test]
fn without_rights_it_says_which_are_missing() -> Result<()> {
    let link = Link::new()?;
    let mut arguments = vec!["load", "--interface", &link.device];
    arguments.extend(PLAN);
    // The binary may lie where only root may look.
    let copy = std::env::temp_dir().join(format!("qjump-bin-{}", std::process::id()));
    fs::copy(binary(), &copy)?;
    let nobody = |arguments: &[&str]| {
        let netns = format!("--net=/run/netns/{}", link.near.name());
        let mut command = Command::new("nsenter");
        command
            .args([&netns, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(&copy)
            .args(arguments);
        // A process group of its own, as a shell would give it.
        command.process_group(0).output()
    };
    check(&nobody(&arguments)?, 1, &["CAP_BPF", "sudo"]);
    check(&nobody(&["unload", "--interface", &link.device])?, 1, &["CAP_BPF", "removing eBPF programs", "sudo"]);
    assert!(!link.pins().exist());
    // Planning needs no rights.
    let mut plan = vec!["plan"];
    plan.extend(PLAN);
    assert!(nobody(&plan)?.status.success());
    link.load(&[])?;
    for arguments in [&["status"][..], &["status", "--interface", &link.device]] {
        check(&nobody(arguments)?, 1, &["/sys/fs/bpf/qjump", "run it as root"]);
    }
    fs::remove_file(copy)?;
    Ok(())
}

#[test]
fn output_into_a_closed_pipe_is_not_an_error() -> Result<()> {
    let script = format!("{} plan {} | true; exit ${{PIPESTATUS[0]}}", binary().display(), PLAN.join(" "));
    for _ in 0..20 {
        assert!(Command::new("bash").args(["-c", &script]).status()?.success());
    }
    Ok(())
}
