//go:build integration

package p2p

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// In a network namespace this binary discovers, and prints what it finds.
func init() {
	helpers["discover"] = func() {
		job := [32]byte{os.Getenv("SPIRT_TEST_JOB")[0]}
		err := Discover(context.Background(), job, strings.Fields(os.Getenv("SPIRT_TEST_ADDRS")), func(a string) { fmt.Println(a) })
		fmt.Fprintln(os.Stderr, err)
	}
}

func mustRun(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// TestDiscoverOnALocalNetwork: three machines on one switch, two of them of one
// job, find each other.
func TestDiscoverOnALocalNetwork(t *testing.T) {
	prefix := fmt.Sprintf("sd%d", os.Getpid())
	bridge := prefix + "s"
	mustRun(t, "ip", "netns", "add", bridge)
	t.Cleanup(func() { mustRun(t, "ip", "netns", "del", bridge) })
	mustRun(t, "ip", "-n", bridge, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
	mustRun(t, "ip", "-n", bridge, "link", "set", "br0", "up")
	type machine struct {
		lines chan string
	}
	var machines []machine
	for i, job := range []string{"a", "a", "b"} {
		ns := fmt.Sprintf("%s%d", prefix, i)
		mustRun(t, "ip", "netns", "add", ns)
		t.Cleanup(func() { mustRun(t, "ip", "netns", "del", ns) })
		port := fmt.Sprintf("p%d", i)
		mustRun(t, "ip", "link", "add", port, "netns", bridge, "type", "veth", "peer", "name", "eth0", "netns", ns)
		mustRun(t, "ip", "-n", bridge, "link", "set", port, "master", "br0", "up")
		mustRun(t, "ip", "-n", ns, "addr", "add", fmt.Sprintf("10.77.0.%d/24", i+1), "dev", "eth0")
		mustRun(t, "ip", "-n", ns, "link", "set", "eth0", "up")
		c := exec.Command("ip", "netns", "exec", ns, os.Args[0])
		c.Env = append(os.Environ(), "SPIRT_P2P_HELPER=discover", "SPIRT_TEST_JOB="+job,
			fmt.Sprintf("SPIRT_TEST_ADDRS=/ip4/10.77.0.%d/tcp/400%d/p2p/%s", i+1, i, someID))
		c.Stderr = os.Stderr
		out, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Process.Kill(); c.Wait() })
		m := machine{make(chan string, 100)}
		machines = append(machines, m)
		go func() {
			for s := bufio.NewScanner(out); s.Scan(); {
				m.lines <- s.Text()
			}
		}()
	}
	for i, want := range []string{"/ip4/10.77.0.2/tcp/4001/p2p/" + someID, "/ip4/10.77.0.1/tcp/4000/p2p/" + someID} {
		select {
		case got := <-machines[i].lines:
			if got != want {
				t.Errorf("machine %d found %s, want %s", i, got, want)
			}
		case <-time.After(patience):
			t.Fatalf("machine %d found nothing", i)
		}
	}
	if len(machines[2].lines) > 0 {
		t.Errorf("a machine of another job found %s", <-machines[2].lines)
	}
}
