//go:build integration

package tensordb_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"errors"
	"math"
	"math/big"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/spirt-ml/spirt/tensordb"
)

// The clients that people have, unmodified, against a Server.

const clientToken = "0123456789abcdef"

// listen serves an empty database and returns its address. config, if not nil,
// has it speak TLS.
func listen(t *testing.T, config *tls.Config) string {
	t.Helper()
	db, err := tensordb.Open(tensordb.Config{})
	if err != nil {
		t.Fatal(err)
	}
	s := tensordb.NewServer(db, tensordb.ServerConfig{Version: "test", Tokens: []tensordb.Token{
		{Secret: clientToken, Access: tensordb.All},
		{Secret: "fedcba9876543210", Prefix: "{a}:", Access: tensordb.Function},
	}})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if config != nil {
		ln = tls.NewListener(ln, config)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(ln) }()
	t.Cleanup(func() {
		if err := errors.Join(s.Close(), <-served, db.Close()); err != nil {
			t.Error(err)
		}
	})
	return ln.Addr().String()
}

func TestGoRedis(t *testing.T) {
	ctx := context.Background()
	for _, protocol := range []int{2, 3} {
		c := redis.NewClient(&redis.Options{Addr: listen(t, nil), Password: clientToken, Protocol: protocol, ClientName: "test"})
		defer c.Close()
		if pong, err := c.Ping(ctx).Result(); err != nil || pong != "PONG" {
			t.Fatal(pong, err)
		}
		data := make([]byte, 12)
		for i := range 3 {
			binary.LittleEndian.PutUint32(data[4*i:], math.Float32bits(float32(i+1)))
		}
		if v, err := c.Do(ctx, "TENSOR.SET", "x", "float32", 1, 3, data).Int64(); err != nil || v == 0 {
			t.Fatal(v, err)
		}
		got, err := c.Do(ctx, "TENSOR.GET", "x").Slice()
		if err != nil || got[0] != "float32" || got[3] != string(data) {
			t.Errorf("%q, %v", got, err)
		}
		norm, err := c.Do(ctx, "TENSOR.NORM", "x").Result()
		if x, ok := norm.(float64); protocol == 3 && (!ok || x != math.Sqrt(14)) || err != nil {
			t.Errorf("the norm is %v, %v", norm, err)
		}
		if protocol == 3 {
			m, err := c.Do(ctx, "TENSOR.META", "x").Result()
			if meta, ok := m.(map[any]any); !ok || meta["dtype"] != "float32" || meta["bytes"] != int64(12) {
				t.Errorf("%v, %v", m, err)
			}
		}
		// Many at once, in one piece.
		cmds, err := c.Pipelined(ctx, func(p redis.Pipeliner) error {
			for range 100 {
				p.Do(ctx, "TENSOR.SCALE", "x", 1, "x")
			}
			return nil
		})
		if err != nil || len(cmds) != 100 {
			t.Errorf("%d answers, %v", len(cmds), err)
		}
		if ok, err := c.Expire(ctx, "x", time.Minute).Result(); err != nil || !ok {
			t.Error(ok, err)
		}
		if ttl, err := c.TTL(ctx, "x").Result(); err != nil || ttl <= 0 || ttl > time.Minute {
			t.Error(ttl, err)
		}
		if keys, _, err := c.Scan(ctx, 0, "x*", 10).Result(); err != nil || len(keys) != 1 {
			t.Error(keys, err)
		}
		if n, err := c.Exists(ctx, "x", "y").Result(); err != nil || n != 1 {
			t.Error(n, err)
		}
		if name, err := c.ClientGetName(ctx).Result(); err != nil || name != "test" {
			t.Error(name, err)
		}
		if all, err := c.Command(ctx).Result(); err != nil || all["tensor.mean"] == nil || all["tensor.mean"].FirstKeyPos != 1 {
			t.Error(len(all), err)
		}
		if err := c.Do(ctx, "TENSOR.GET", "none").Err(); err == nil || !strings.HasPrefix(err.Error(), "NOKEY") {
			t.Error(err)
		}
		if n, err := c.Del(ctx, "x").Result(); err != nil || n != 1 {
			t.Error(n, err)
		}
	}
}

// certificate makes one for 127.0.0.1 and the pool that trusts it.
func certificate(t *testing.T) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(parsed)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pool
}

func TestTLSClients(t *testing.T) {
	cert, pool := certificate(t)
	address := listen(t, &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12})
	c := redis.NewClient(&redis.Options{Addr: address, Password: clientToken, TLSConfig: &tls.Config{RootCAs: pool}})
	defer c.Close()
	if err := c.Ping(context.Background()).Err(); err != nil {
		t.Error(err)
	}
	// Ours, as peers use it.
	a, err := tensordb.ParseAddress("rediss://" + clientToken + "@" + address)
	if err != nil {
		t.Fatal(err)
	}
	client, err := tensordb.Connect(t.Context(), a, tensordb.ClientConfig{TLS: &tls.Config{RootCAs: pool}})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if has, err := client.Knows("TENSOR.SET"); err != nil || !has {
		t.Error(has, err)
	}
	// Who does not trust the certificate does not send the token.
	if _, err := tensordb.Connect(t.Context(), a, tensordb.ClientConfig{}); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Error(err)
	}
}

// script runs a program against a server and returns what it printed.
func script(t *testing.T, stdin, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s (Debian's packages redis-tools and python3-redis have what is needed): %v\n%s%s", name, err, out, stderr.String())
	}
	return string(out)
}

func TestRedisCLI(t *testing.T) {
	host, port, err := net.SplitHostPort(listen(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	for _, protocol := range []string{"-2", "-3"} {
		cli := func(args ...string) string {
			return strings.TrimSpace(script(t, "", "redis-cli", append([]string{"-h", host, "-p", port, "-a", clientToken, "--no-auth-warning", protocol}, args...)...))
		}
		if got := cli("PING"); got != "PONG" {
			t.Errorf("%q", got)
		}
		cli("TENSOR.SET", "t", "uint8", "1", "3", "abc")
		if got := cli("TENSOR.ROWS", "t", "2", "0"); got != "ca" {
			t.Errorf("%q", got)
		}
		if got := cli("TENSOR.META", "t"); !strings.Contains(got, "uint8") {
			t.Errorf("%q", got)
		}
		if got := cli("--scan", "--pattern", "t*"); got != "t" {
			t.Errorf("%q", got)
		}
		if got := cli("TENSOR.NOTHING"); !strings.Contains(got, "unknown command") {
			t.Errorf("%q", got)
		}
		if got := cli("COMMAND", "DOCS", "TENSOR.MEAN"); !strings.Contains(got, "mean of tensors") {
			t.Errorf("%q", got)
		}
	}
	// As at a prompt, with a list of commands.
	out := script(t, "TENSOR.SET a uint8 1 1 x\nTENSOR.COPY b a\nEXISTS a b\nDEL a b\n", "redis-cli", "-h", host, "-p", port, "-a", clientToken, "--no-auth-warning")
	if lines := strings.Fields(out); len(lines) != 4 || lines[1] != "OK" || lines[2] != "2" || lines[3] != "2" {
		t.Errorf("%q", out)
	}
}

const redisPy = `
import sys, struct, redis
host, port, token, other = sys.argv[1:]
db = redis.Redis(host=host, port=int(port), password=token)
assert db.ping()
x = struct.pack('<3f', 1, 2, 3)
db.execute_command('TENSOR.SET', '{a}:x', 'float32', 1, 3, x)
dtype, shape, version, data = db.execute_command('TENSOR.GET', '{a}:x')
assert (dtype, shape, data) == (b'float32', [3], x), (dtype, shape, data)
assert db.execute_command('TENSOR.GET', '{a}:x', 'IFNOT', version) is None
with db.pipeline(transaction=False) as p:
    for i in range(10):
        p.execute_command('TENSOR.AXPY', '{a}:x', '{a}:x', '{a}:x', 1)
    p.execute()
assert struct.unpack('<3f', db.execute_command('TENSOR.GET', '{a}:x')[3]) == (1024, 2048, 3072)
assert list(db.scan_iter(match='{a}:*')) == [b'{a}:x']
assert db.expire('{a}:x', 100) and 0 < db.ttl('{a}:x') <= 100
db.client_setname('py'); assert db.client_getname() == 'py'
assert db.info()['server'] == 'spirt'
assert db.dbsize() == 1
function = redis.Redis(host=host, port=int(port), username='default', password=other)
assert function.exists('{a}:x') == 1
for command in (['TENSOR.GET', '{b}:x'], ['DEL', '{a}:x']):
    try:
        function.execute_command(*command)
    except redis.exceptions.ResponseError as e:
        assert 'may not use' in str(e), e
    else:
        raise AssertionError(command)
try:
    redis.Redis(host=host, port=int(port), password='wrong').ping()
except redis.exceptions.RedisError as e:
    assert 'no such token' in str(e), e
else:
    raise AssertionError('a wrong token')
print('ok')
`

func TestRedisPy(t *testing.T) {
	host, port, err := net.SplitHostPort(listen(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	if got := script(t, redisPy, "/usr/bin/python3", "-", host, port, clientToken, "fedcba9876543210"); got != "ok\n" {
		t.Errorf("%q", got)
	}
}
