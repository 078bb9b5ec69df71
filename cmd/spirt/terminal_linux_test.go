package main

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/spirt-ml/spirt"
)

// aTerminal is a pseudo terminal: what a person at it would see and type, and
// what a program gets.
type aTerminal struct {
	t       *testing.T
	person  *os.File
	program *os.File
	seen    []byte
	read    chan []byte // closed when the program has let go of the terminal
}

func openPTY(t *testing.T, width, height uint16) *aTerminal {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { person.Close() })
	fd := int(person.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { program.Close() })
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Col: width, Row: height}); err != nil {
		t.Fatal(err)
	}
	return &aTerminal{t: t, person: person, program: program, read: make(chan []byte)}
}

// start starts spirt at the terminal.
func (a *aTerminal) start(args ...string) *exec.Cmd {
	a.t.Helper()
	exe, err := os.Executable()
	if err != nil {
		a.t.Fatal(err)
	}
	cmd := exec.Command(exe, args...)
	cmd.Env = append(os.Environ(), "TERM=xterm", "SPIRT_TEST_MAIN=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = a.program, a.program, a.program
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		a.t.Fatal(err)
	}
	timer := time.AfterFunc(limit, func() { cmd.Process.Kill() })
	a.t.Cleanup(func() {
		timer.Stop()
		cmd.Process.Kill()
	})
	go func() { // ends with the terminal
		defer close(a.read)
		for {
			b := make([]byte, 32<<10)
			n, err := a.person.Read(b)
			if err != nil {
				return
			}
			a.read <- b[:n]
		}
	}()
	return cmd
}

// until waits until something was shown.
func (a *aTerminal) until(text string) {
	a.t.Helper()
	from := len(a.seen)
	for !bytes.Contains(a.seen[from:], []byte(text)) {
		b, ok := <-a.read
		if !ok {
			a.t.Fatalf("%q was never shown, but\n%q", text, a.seen)
		}
		a.seen = append(a.seen, b...)
	}
}

// rest reads all that is shown until the program has ended.
func (a *aTerminal) rest(cmd *exec.Cmd) (code int) {
	a.t.Helper()
	ended := make(chan int, 1)
	go func() {
		cmd.Wait()
		a.program.Close() // nobody has it now: reading ends
		ended <- cmd.ProcessState.ExitCode()
	}()
	for b := range a.read {
		a.seen = append(a.seen, b...)
	}
	return <-ended
}

func (a *aTerminal) echoes() bool {
	a.t.Helper()
	modes, err := unix.IoctlGetTermios(int(a.person.Fd()), unix.TCGETS)
	if err != nil {
		a.t.Fatal(err)
	}
	return modes.Lflag&unix.ECHO != 0
}

// Ctrl-C at the terminal stops the run cleanly; the picture fits, says so, and
// the terminal is as it was.
func TestTerminalInterrupt(t *testing.T) {
	a := openPTY(t, 80, 24)
	dir := filepath.Join(t.TempDir(), "run")
	cmd := a.start("train", "--model", "mlp", "--peers", "2", "--rounds", "1000000", "--run", dir)
	a.until("mlp on mnist-10k")
	a.until("/1000000") // a picture later
	if a.echoes() {
		t.Error("keys are echoed into the picture")
	}
	a.until("running")
	io.WriteString(a.person, "\x03")
	a.until("stopping: the peers write their checkpoints")
	if code := a.rest(cmd); code != spirt.ExitInterrupted {
		t.Errorf("exit code %d\n%q", code, a.seen)
	}
	if !a.echoes() {
		t.Error("the terminal was left without echo")
	}
	pictures := strings.Split(string(a.seen), "\x1b[?2026h")
	for _, p := range pictures[1:] {
		p, _, _ = strings.Cut(p, "\x1b[J")
		if n := strings.Count(p, "\n"); n > 23 {
			t.Errorf("a picture of %d lines on 24", n)
		}
	}
	if last := pictures[len(pictures)-1]; !strings.Contains(last, "interrupted") || !strings.Contains(last, "stopped") {
		t.Errorf("the last picture: %q", last)
	}
	processes, err := spirt.Processes(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range processes {
		if p.Running {
			t.Errorf("peer %d still runs", p.Peer)
		}
	}
}

// The second Ctrl-C ends the run at once.
func TestTerminalSecondInterrupt(t *testing.T) {
	a := openPTY(t, 80, 24)
	dir := filepath.Join(t.TempDir(), "run")
	cmd := a.start("train", "--model", "mlp", "--peers", "2", "--rounds", "1000000", "--run", dir)
	a.until("running")
	a.until("/1000000")
	processes, err := spirt.Processes(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range processes { // they do not obey the first
		syscall.Kill(p.PID, syscall.SIGSTOP)
	}
	io.WriteString(a.person, "\x03")
	a.until("stopping: ")
	io.WriteString(a.person, "\x03")
	if code := a.rest(cmd); code != spirt.ExitInterrupted && cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGINT {
		t.Errorf("exit code %d\n%q", code, a.seen)
	}
	if !a.echoes() {
		t.Error("the terminal was left without echo")
	}
	if _, stdout, stderr := spirtOf(t, "stop", dir, "--now"); !strings.Contains(stdout, "no peer of") {
		t.Errorf("peers were left: %s%s", stdout, stderr)
	}
}

// Without a terminal that can be drawn on there are lines.
func TestTerminalPlain(t *testing.T) {
	for _, args := range [][]string{{"--plain"}, {"--json"}} {
		a := openPTY(t, 80, 24)
		cmd := a.start(append([]string{"train", "--model", "logistic", "--peers", "1", "--rounds", "5", "--run", filepath.Join(t.TempDir(), "run")}, args...)...)
		if code := a.rest(cmd); code != spirt.ExitDone || bytes.ContainsRune(a.seen, '\x1b') || !bytes.Contains(a.seen, []byte("training logistic")) {
			t.Errorf("%v: exit code %d\n%q", args, code, a.seen)
		}
	}
}
