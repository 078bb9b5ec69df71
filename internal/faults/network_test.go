//go:build integration && linux

package faults

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// network is one network namespace for each machine and one, the hub, with
// the bridge that joins them. Nothing of it is in the namespace of the tests,
// so that several networks do not meet. Machine n, from 1, has the address of
// ip(n).
type network struct {
	t        *testing.T
	prefix   string // of the namespaces' names
	machines int
	groups   map[int]string // control groups of slow machines
}

// Namespaces are named so that those whose test process is gone can be told.
const namespaces = "spirt-faults-"

// port is where peers listen.
const port = 7000

func newNetwork(t *testing.T, machines int) *network {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("network namespaces need root: run the tests with -tags integration as root")
	}
	removeStale(t)
	n := &network{t: t, prefix: fmt.Sprintf("%s%d-", namespaces, os.Getpid()), machines: machines, groups: map[int]string{}}
	t.Cleanup(n.remove)
	hub := n.hub()
	n.ip("netns", "add", hub)
	n.ip("-n", hub, "link", "set", "lo", "up")
	n.ip("-n", hub, "link", "add", "bridge", "type", "bridge")
	n.ip("-n", hub, "addr", "add", hubIP+"/24", "dev", "bridge")
	n.ip("-n", hub, "link", "set", "bridge", "up")
	for i := 1; i <= machines; i++ {
		ns, link := n.namespace(i), fmt.Sprint("link", i)
		n.ip("netns", "add", ns)
		n.ip("-n", ns, "link", "set", "lo", "up")
		n.ip("-n", hub, "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", ns)
		n.ip("-n", hub, "link", "set", link, "master", "bridge", "up")
		n.ip("-n", ns, "addr", "add", ip(i)+"/24", "dev", "eth0")
		n.ip("-n", ns, "link", "set", "eth0", "up")
		n.nft(i, "table inet cut { chain in { type filter hook input priority 0; }; chain out { type filter hook output priority 0; }; }")
	}
	return n
}

const hubIP = "10.77.0.254"

func ip(machine int) string { return fmt.Sprint("10.77.0.", machine) }

func (n *network) hub() string                  { return n.prefix + "hub" }
func (n *network) namespace(machine int) string { return n.prefix + strconv.Itoa(machine) }

func (n *network) ip(args ...string) { must(n.t, exec.Command("ip", args...)) }

// in makes a command that runs in a namespace.
func in(namespace, exe string, args ...string) *exec.Cmd {
	return exec.Command("ip", append([]string{"netns", "exec", namespace, exe}, args...)...)
}

func (n *network) nft(machine int, rules string) {
	n.t.Helper()
	cmd := in(n.namespace(machine), "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules + "\n")
	must(n.t, cmd)
}

// cut drops every packet that would reach machine `to` from machine `from`;
// proxied or not. With nothing coming in there are no acknowledgements either,
// so that connections stall both ways, but each side sees it otherwise.
func (n *network) cut(from, to int) {
	n.t.Helper()
	a := ip(from)
	n.nft(to, "add rule inet cut in ip saddr "+a+" drop; add rule inet cut in ct direction reply ct original ip daddr "+a+" drop")
	n.nft(from, "add rule inet cut out ct original ip daddr "+ip(to)+" ct direction original drop")
}

// partition cuts the machines of each side off from those of the others.
func (n *network) partition(sides ...[]int) {
	n.t.Helper()
	for i, side := range sides {
		for j, other := range sides {
			for _, a := range side {
				for _, b := range other {
					if i != j {
						n.cut(a, b)
					}
				}
			}
		}
	}
}

// heal ends all cuts.
func (n *network) heal() {
	n.t.Helper()
	for i := 1; i <= n.machines; i++ {
		n.nft(i, "flush chain inet cut in; flush chain inet cut out")
	}
}

// limit bounds what a machine sends, and what it is sent, to a rate of tc,
// such as 1mbit.
func (n *network) limit(machine int, rate string) {
	n.t.Helper()
	for ns, dev := range map[string]string{n.namespace(machine): "eth0", n.hub(): fmt.Sprint("link", machine)} {
		must(n.t, exec.Command("tc", "-n", ns, "qdisc", "add", "dev", dev, "root", "tbf", "rate", rate, "burst", "32kb", "latency", "500ms"))
	}
}

// toxiproxy is what delays: the kernels that these tests run on may lack
// netem.
const toxiproxy = "github.com/Shopify/toxiproxy/v2/cmd/...@v2.5.0"

// delay lets everything that goes from one machine to another wait for d, in
// both directions, from connections that are made from now on.
func (n *network) delay(d time.Duration) {
	n.t.Helper()
	dir := n.t.TempDir()
	install := exec.Command("go", "install", toxiproxy)
	install.Env = append(os.Environ(), "GOBIN="+dir, "GOFLAGS=-mod=mod")
	must(n.t, install)
	server := in(n.hub(), filepath.Join(dir, "server"))
	if err := server.Start(); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() {
		server.Process.Kill()
		server.Wait()
	})
	cli := func(args ...string) *exec.Cmd { return in(n.hub(), filepath.Join(dir, "cli"), args...) }
	poll(n.t, "toxiproxy", func() bool { return cli("list").Run() == nil })
	for to := 1; to <= n.machines; to++ {
		name, at := ip(to), fmt.Sprintf("%s:%d", hubIP, 8000+to)
		must(n.t, cli("create", "--listen", at, "--upstream", fmt.Sprintf("%s:%d", ip(to), port), name))
		for _, stream := range []string{"--upstream", "--downstream"} {
			must(n.t, cli("toxic", "add", "--type", "latency", "--attribute", fmt.Sprint("latency=", d.Milliseconds()), stream, name))
		}
		for from := 1; from <= n.machines; from++ {
			if from != to {
				n.nft(from, fmt.Sprintf("add table ip proxy; add chain ip proxy out { type nat hook output priority 0; }; add rule ip proxy out ip daddr %s tcp dport %d dnat to %s", name, port, at))
			}
		}
	}
}

// slow gives a machine so much of one CPU, such as 0.125, until the test ends.
// Processes that are started afterwards are bound by it.
func (n *network) slow(machine int, cpus float64) {
	n.t.Helper()
	const period = 10_000 // µs
	quota := strconv.Itoa(int(cpus * period))
	dir := filepath.Join("/sys/fs/cgroup/cpu", n.namespace(machine))
	settings := map[string]string{"cpu.cfs_period_us": strconv.Itoa(period), "cpu.cfs_quota_us": quota}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil { // version 2
		dir = filepath.Join("/sys/fs/cgroup", n.namespace(machine))
		settings = map[string]string{"cpu.max": quota + " " + strconv.Itoa(period)}
		n.write("/sys/fs/cgroup/cgroup.subtree_control", "+cpu")
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		n.t.Fatal("making a control group: ", err)
	}
	n.t.Cleanup(func() { removeGroup(n.t, dir) })
	for name, value := range settings {
		n.write(filepath.Join(dir, name), value)
	}
	n.groups[machine] = filepath.Join(dir, "cgroup.procs")
}

func (n *network) write(path, value string) {
	n.t.Helper()
	if err := os.WriteFile(path, []byte(value), 0o644); err != nil {
		n.t.Fatal(err)
	}
}

// removeGroup removes a control group once its processes, which were killed,
// have ended.
func removeGroup(t *testing.T, dir string) {
	poll(t, "the processes in "+dir, func() bool {
		b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		return err != nil || len(b) == 0
	})
	if err := os.Remove(dir); err != nil {
		t.Errorf("removing a control group: %v", err)
	}
}

// on makes a command that runs on a machine.
func (n *network) on(machine int, exe string, args ...string) *exec.Cmd {
	cmd := in(n.namespace(machine), exe, args...)
	if group := n.groups[machine]; group != "" { // which cannot be seen from the namespace
		cmd = exec.Command("/bin/sh", append([]string{"-e", "-c", `echo $$ >"$0"; exec "$@"`, group}, cmd.Args...)...)
	}
	return cmd
}

// remove ends what still runs in the namespaces and removes them.
func (n *network) remove() { removeNamespaces(n.t, n.prefix) }

// removeStale removes what interrupted tests have left.
func removeStale(t *testing.T) {
	for _, ns := range listNamespaces(t, namespaces) {
		pid, _, _ := strings.Cut(strings.TrimPrefix(ns, namespaces), "-")
		if id, err := strconv.Atoi(pid); err == nil && syscall.Kill(id, 0) != nil {
			removeNamespaces(t, namespaces+pid+"-")
		}
	}
}

func listNamespaces(t *testing.T, prefix string) (names []string) {
	out, err := exec.Command("ip", "netns", "list").Output()
	if err != nil {
		t.Fatalf("ip netns list: %v: the tests need Debian's iproute2", err)
	}
	for line := range strings.Lines(string(out)) {
		if name, _, _ := strings.Cut(strings.TrimSpace(line), " "); strings.HasPrefix(name, prefix) {
			names = append(names, name)
		}
	}
	return names
}

func removeNamespaces(t *testing.T, prefix string) {
	for _, ns := range listNamespaces(t, prefix) {
		out, _ := exec.Command("ip", "netns", "pids", ns).Output()
		for _, pid := range strings.Fields(string(out)) {
			if id, err := strconv.Atoi(pid); err == nil {
				syscall.Kill(id, syscall.SIGKILL)
			}
		}
		if out, err := exec.Command("ip", "netns", "delete", ns).CombinedOutput(); err != nil && t != nil {
			t.Errorf("removing the namespace %s: %v\n%s", ns, err, out)
		}
	}
}

// must runs a command to its end.
func must(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, out)
	}
}

// patience bounds everything that a test waits for.
const patience = 2 * time.Minute

// poll waits until ok.
func poll(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited %v for %s", patience, what)
		}
	}
}
