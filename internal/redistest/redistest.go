// Package redistest starts Redis servers for tests, with the module of package
// tensordb or without. Where there is no redis-server or no C compiler, the
// test fails: such tests stand behind the build tag integration.
package redistest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/resp"
)

// Server is a Redis server that listens on a Unix socket and on a port of the
// loopback interface.
type Server struct {
	Dir     string
	Socket  string
	Address string // host:port

	t    testing.TB
	args []string
	cmd  *exec.Cmd
}

var module = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "spirt-module-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "spirt.so")
	cmd := exec.Command("go", "build", "-buildmode=c-shared", "-tags", "redismodule", "-o", path, "github.com/spirt-ml/spirt/tensordb/redismodule")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building the module (Debian's package gcc has what is needed): %w\n%s", err, out)
	}
	return path, os.Chmod(path, 0o755)
})

// Module returns the path of the module, which it builds once for each test
// process.
func Module(t testing.TB) string {
	t.Helper()
	path, err := module()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// Start starts a server with these words of configuration, such as
// "--appendonly", "yes", until the test ends. It keeps nothing on disk unless
// they say so.
func Start(t testing.TB, args ...string) *Server {
	t.Helper()
	dir, err := os.MkdirTemp("", "spirt-redis-") // a short path: a socket's is bounded
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil { // for functions that are other users
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := ln.Addr().String()
	ln.Close()
	_, port, _ := net.SplitHostPort(address)
	s := &Server{Dir: dir, Socket: filepath.Join(dir, "s"), Address: address, t: t}
	s.args = append([]string{
		"--bind", "127.0.0.1", "--port", port, "--unixsocket", s.Socket, "--unixsocketperm", "777", "--dir", dir, "--save", "", "--appendonly", "no",
		"--logfile", filepath.Join(dir, "log"), "--enable-debug-command", "yes", "--crash-log-enabled", "no", "--proto-max-bulk-len", "1gb",
	}, args...)
	t.Cleanup(func() {
		s.Kill()
		if t.Failed() {
			t.Logf("the log of the Redis server:\n%s", s.Log())
		}
		os.RemoveAll(dir)
	})
	s.Run()
	return s
}

// WithModule starts a server that has loaded the module.
func WithModule(t testing.TB, args ...string) *Server {
	t.Helper()
	return Start(t, append([]string{"--loadmodule", Module(t)}, args...)...)
}

// Run starts the server again after Kill, and waits until it answers.
func (s *Server) Run() {
	s.t.Helper()
	s.cmd = exec.Command("redis-server", s.args...)
	if err := s.cmd.Start(); err != nil {
		s.t.Fatalf("starting redis-server (Debian's package redis-server has it): %v", err)
	}
	until := time.Now().Add(60 * time.Second)
	for {
		conn, err := resp.Dial(context.Background(), "unix", s.Socket, resp.DialOptions{})
		if err == nil {
			_, err = conn.Do(context.Background(), "PING") // refused while it loads
			conn.Close()
		}
		var refused *resp.Error
		if err == nil || errors.As(err, &refused) && refused.Code == "NOAUTH" {
			return
		}
		if time.Now().After(until) || strings.Contains(s.Log(), "aborting") {
			s.t.Fatalf("redis-server does not answer: %v\n%s", err, s.Log())
		}
		time.Sleep(5 * time.Millisecond) // it tells nobody when it is ready
	}
}

// Kill ends the server with SIGKILL and waits for its end.
func (s *Server) Kill() {
	if s.cmd != nil {
		s.cmd.Process.Kill()
		s.cmd.Wait()
		s.cmd = nil
	}
}

// Dial connects to the server until the test ends.
func (s *Server) Dial() *resp.Conn {
	s.t.Helper()
	conn, err := resp.Dial(context.Background(), "unix", s.Socket, resp.DialOptions{Timeout: 5 * time.Minute, Limits: resp.Limits{MaxBulk: 1 << 30}})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	return conn
}

// Do sends a command, which must not be refused.
func (s *Server) Do(args ...any) resp.Reply {
	s.t.Helper()
	conn := s.Dial()
	r, err := conn.Do(context.Background(), args...)
	if err != nil {
		s.t.Fatalf("%v: %v", args[0], err)
	}
	return r
}

// Log returns what the server has logged.
func (s *Server) Log() string {
	b, _ := os.ReadFile(filepath.Join(s.Dir, "log"))
	return string(b)
}
