//go:build unix

package main

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/resp"
)

// dbRun is a `spirt db --json` in a process of its own.
type dbRun struct {
	t       *testing.T
	cmd     *exec.Cmd
	events  *bufio.Scanner
	ready   map[string]any
	seen    []string // names of the events before
	address string
	token   string
}

// startDB starts a database, and waits until it is ready.
func startDB(t *testing.T, dir string, flags ...string) *dbRun {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	r := &dbRun{t: t, cmd: exec.Command(exe, append([]string{"db", "--json", "--listen", "127.0.0.1:0", "--dir", dir}, flags...)...)}
	stderr := new(bytes.Buffer)
	r.cmd.Stderr = stderr
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	r.events = bufio.NewScanner(out)
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(limit, func() { r.cmd.Process.Kill() })
	t.Cleanup(func() {
		timer.Stop()
		r.cmd.Process.Kill()
		r.cmd.Wait()
	})
	r.ready = r.until("ready")
	if r.ready == nil {
		t.Fatalf("the database does not start: %v %s", r.seen, stderr)
	}
	r.address = strings.Fields(r.ready["listen"].(string))[0]
	if b, err := os.ReadFile(filepath.Join(dir, "token")); err == nil {
		r.token = strings.TrimSpace(string(b))
	}
	return r
}

// until reads events up to one of this name, nil if there is none.
func (r *dbRun) until(name string) map[string]any {
	for r.events.Scan() {
		var e map[string]any
		if err := json.Unmarshal(r.events.Bytes(), &e); err != nil {
			r.t.Fatalf("event %s: %v", r.events.Bytes(), err)
		}
		r.seen = append(r.seen, e["event"].(string))
		if strings.HasPrefix(e["event"].(string), name) {
			return e
		}
	}
	return nil
}

func (r *dbRun) stop(signal os.Signal) error {
	r.cmd.Process.Signal(signal)
	for r.events.Scan() {
	}
	return r.cmd.Wait()
}

func (r *dbRun) dial() *resp.Conn {
	r.t.Helper()
	c, err := resp.Dial(r.t.Context(), "tcp", r.address, resp.DialOptions{Token: r.token})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	return c
}

func (r *dbRun) do(c *resp.Conn, args ...any) resp.Reply {
	r.t.Helper()
	reply, err := c.Do(r.t.Context(), args...)
	if err != nil {
		r.t.Fatalf("%v: %v", args[0], err)
	}
	return reply
}

// Stopped, the database writes a checkpoint, and started again goes on from
// it, with kinds, times and deletions; a damaged one is told and passed over.
func TestDatabaseResumes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "db")
	r := startDB(t, dir, "--save-every", "0")
	c := r.dial()
	r.do(c, "TENSOR.SET", "x", "uint8", 1, 3, "abc")
	r.do(c, "TENSOR.SET", "gone", "uint8", 1, 3, "abc")
	r.do(c, "TENSOR.SET", "g", "uint8", 1, 3, "abc")
	r.do(c, "TENSOR.KIND", "g", "GRADIENT")
	r.do(c, "EXPIRE", "x", 1000)
	r.do(c, "SAVE")
	r.do(c, "DEL", "gone")

	second := exec.Command(r.cmd.Path, "db", "--dir", dir, "--listen", "127.0.0.1:0")
	out, err := second.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "is in use by process "+strconv.Itoa(r.cmd.Process.Pid)) {
		t.Errorf("a second process: %v %s", err, out)
	}
	if err := r.stop(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}

	r = startDB(t, dir, "--save-every", "0")
	if r.ready["tensors"] != 1.0 || r.seen[0] != "a checkpoint was recovered" {
		t.Fatalf("%v, after %v", r.ready, r.seen)
	}
	c = r.dial()
	if n := r.do(c, "TTL", "x").Int; n < 900 || n > 1000 {
		t.Errorf("TTL %d", n)
	}
	if r.do(c, "EXISTS", "gone").Int != 0 {
		t.Error("what was deleted after a SAVE came back")
	}
	if err := r.stop(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}

	files, _ := filepath.Glob(filepath.Join(dir, "*.ckpt"))
	if len(files) != 2 {
		t.Fatalf("checkpoints %v", files)
	}
	b, err := os.ReadFile(files[1])
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-1] ^= 1
	if err := os.WriteFile(files[1], b, 0o600); err != nil {
		t.Fatal(err)
	}
	r = startDB(t, dir)
	if r.ready["tensors"] != 2.0 || r.seen[0] != "a checkpoint cannot be used, trying the one before" {
		t.Fatalf("%v, after %v", r.ready, r.seen)
	}
}

// Killed in the middle of saves, the database has what the last SAVE that was
// answered had, or more, whole.
func TestDatabaseKilled(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "db")
	acknowledged, next := 0, 1
	for life := range 4 {
		r := startDB(t, dir)
		c := r.dial()
		if life > 0 {
			a := string(r.do(c, "TENSOR.GET", "a").Elems[3].Bytes)
			b := string(r.do(c, "TENSOR.GET", "b").Elems[3].Bytes)
			n, err := strconv.Atoi(strings.TrimSpace(a[:8]))
			if err != nil || n < acknowledged || n >= next {
				t.Fatalf("life %d: recovered %d, %d was acknowledged: %v", life, n, acknowledged, err)
			}
			// The checkpoint that was written when it was killed may have
			// been between the two: then none was acknowledged after it.
			if a != content(n) || b != content(n) && b != content(n-1) {
				t.Fatalf("life %d: a and b of %d are not whole", life, n)
			}
			next = max(next, n+1)
		}
		var kill *time.Timer
		for {
			data := content(next)
			next++
			var err error
			for _, key := range []string{"a", "b"} {
				if err == nil {
					_, err = c.Do(t.Context(), "TENSOR.SET", key, "uint8", 1, len(data), data)
				}
			}
			if err == nil {
				_, err = c.Do(t.Context(), "SAVE")
			}
			if err != nil {
				break // killed
			}
			acknowledged = next - 1
			if kill == nil {
				kill = time.AfterFunc(time.Duration(20+17*life)*time.Millisecond, func() { r.cmd.Process.Kill() })
			}
		}
		if kill == nil {
			t.Fatal("the database ended before the first SAVE was answered")
		}
		r.stop(os.Kill)
	}
}

// content is what a and b have in save n.
func content(n int) string { return strings.Repeat(fmt.Sprintf("%-8d", n), 50_000) }

// Over TLS, with a list of tokens.
func TestDatabaseTLS(t *testing.T) {
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "db"}, NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	certFile := write("cert.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}))
	keyFile := write("key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	tokens := write("tokens.yaml", []byte("- {token: everything-is-allowed, access: all}\n- {token: only-what-starts-so, access: read, prefix: 'a:'}\n"))
	r := startDB(t, filepath.Join(dir, "db"), "--tls-cert", certFile, "--tls-key", keyFile, "--tokens", tokens, "--max-connections", "3")

	roots := x509.NewCertPool()
	parsed, err := x509.ParseCertificate(cert)
	if err != nil {
		t.Fatal(err)
	}
	roots.AddCert(parsed)
	dial := func(token string) *resp.Conn {
		c, err := resp.Dial(t.Context(), "tls", r.address, resp.DialOptions{Token: token, TLS: &tls.Config{RootCAs: roots}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	all, some := dial("everything-is-allowed"), dial("only-what-starts-so")
	r.do(all, "TENSOR.SET", "a:x", "uint8", 1, 3, "abc")
	if got := r.do(some, "TENSOR.GET", "a:x").Elems[3].Bytes; string(got) != "abc" {
		t.Errorf("got %q", got)
	}
	if _, err := some.Do(t.Context(), "DEL", "a:x"); err == nil || !strings.HasPrefix(err.Error(), "NOPERM") {
		t.Errorf("deleting with a token that reads: %v", err)
	}

	// Who does not speak TLS, or an older one, gets nowhere.
	if nc, err := tls.Dial("tcp", r.address, &tls.Config{RootCAs: roots, MaxVersion: tls.VersionTLS11, MinVersion: tls.VersionTLS10}); err == nil {
		nc.Close()
		t.Error("TLS 1.1 is spoken")
	}
	// Connections that say nothing hold no place for long that others need;
	// one too many is closed, and holds nobody up.
	var idle []net.Conn
	for range 4 {
		nc, err := net.Dial("tcp", r.address)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		idle = append(idle, nc)
	}
	idle[3].SetReadDeadline(time.Now().Add(5 * time.Second))
	if n, err := idle[3].Read(make([]byte, 1)); err == nil {
		t.Errorf("one connection too many reads %d bytes", n)
	} else if ne, ok := err.(net.Error); ok && ne.Timeout() {
		t.Error("one connection too many is held")
	}
	r.do(all, "PING")
}

func TestByteSize(t *testing.T) {
	for text, want := range map[string]byteSize{"4GB": 4e9, "512MiB": 512 << 20, "1.5GiB": 3 << 29, "7b": 7, "2 kb": 2000, "1TiB": 1 << 40} {
		var s byteSize
		if err := s.Set(text); err != nil || s != want {
			t.Errorf("%s: %d, %v", text, s, err)
		}
		var again byteSize
		if err := again.Set(s.String()); err != nil || again != s {
			t.Errorf("%s is written as %s", text, s)
		}
	}
	for _, text := range []string{"", "4", "GB", "-1GB", "0B", "1e30TB", "NaNB", "InfGB", "4 G", "0.1B"} {
		var s byteSize
		if err := s.Set(text); err == nil {
			t.Errorf("%q is %d", text, s)
		}
	}
}

func FuzzParseTokens(f *testing.F) {
	f.Add([]byte("- {token: everything-is-allowed, access: all}\n- token: only-what-starts-so\n  access: read\n  prefix: 'a:'\n"))
	f.Add([]byte("[{token: &x everything-is-allowed, access: all}, *x, {<<: *x}]"))
	f.Add([]byte("--- {}\n--- []"))
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := parseTokens(b)
		if err != nil {
			return
		}
		for _, token := range list {
			if checkToken(token.Secret) != nil {
				t.Fatalf("token %q", token.Secret)
			}
		}
	})
}
