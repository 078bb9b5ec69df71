package main

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/pbnjay/memory"
	"github.com/spf13/cobra"

	"github.com/spirt-ml/spirt"
	"github.com/spirt-ml/spirt/tensordb"
)

// dbConfig is what the flags of `spirt db` say.
type dbConfig struct {
	listen         []string
	dir            string
	memory         byteSize
	onFull         string
	saveEvery      time.Duration
	tokens         string
	open           bool
	cert, key      string
	insecure       bool
	maxConnections int
	maxRequest     byteSize
	idleTimeout    time.Duration
	json           bool
}

const (
	noFolder       = "none" // as --dir: nothing is kept
	checkpointName = "db"
	tokenFile      = "token"
	minToken       = 16
	maxTokenFile   = 256 << 10
	maxTokens      = 1024
)

func dbCommand(stdout, stderr io.Writer) *cobra.Command {
	cfg := dbConfig{
		listen: []string{"127.0.0.1:6480"}, dir: "spirt-db", onFull: "refuse", saveEvery: time.Minute,
		maxConnections: 1024, maxRequest: 1 << 30, idleTimeout: 10 * time.Minute,
	}
	c := &cobra.Command{
		Use:   "db",
		Short: "Serve a tensor database alone",
		Long: "Db serves a tensor database, as each peer has one, to any Redis client, until Ctrl-C. What it\n" +
			"keeps is in a folder: checkpoints, from which it goes on, and the token that clients show,\n" +
			"which is made at the first start. Gradients are not kept. docs/tensordb.md is the manual,\n" +
			"docs/commands.md lists the commands.",
		Example: "  spirt db                       # on this machine alone, with its folder in spirt-db\n" +
			"  REDISCLI_AUTH=$(cat spirt-db/token) redis-cli -p 6480 INFO\n" +
			"  python3 -c 'import redis; print(redis.Redis(port=6480, password=open(\"spirt-db/token\").read().strip()).ping())'\n" +
			"  spirt db --dir none --open --listen unix:/tmp/t.sock   # nothing is kept, no token\n" +
			"  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 \\\n" +
			"    -subj /CN=db.example.org -addext subjectAltName=DNS:db.example.org -keyout key.pem -out cert.pem\n" +
			"  spirt db --listen 0.0.0.0:6480 --tls-cert cert.pem --tls-key key.pem --memory 4GB",
		RunE: func(c *cobra.Command, _ []string) error { return serveDB(c.Context(), cfg, stdout, stderr) },
	}
	f := c.Flags()
	f.StringArrayVar(&cfg.listen, "listen", cfg.listen, "host:port, or unix:PATH for a socket that only this user can open (repeatable)")
	f.StringVar(&cfg.dir, "dir", cfg.dir, "folder of the checkpoints and the token, or none: nothing is kept")
	f.Var(&cfg.memory, "memory", "most memory of tensors and transfers, such as 4GB or 512MiB (default half of this machine's)")
	f.StringVar(&cfg.onFull, "on-full", cfg.onFull, "where memory is short: refuse, or drop-gradients, the least recently used first")
	f.DurationVar(&cfg.saveEvery, "save-every", cfg.saveEvery, "time between checkpoints, if something has changed; 0: only at the end and when told to")
	f.StringVar(&cfg.tokens, "tokens", "", "YAML file, mode 0600, with a list of {token, access: all|function|read, prefix} (default one token, in the folder)")
	f.BoolVar(&cfg.open, "open", false, "let whoever can connect do everything; only on loopback and Unix sockets")
	f.StringVar(&cfg.cert, "tls-cert", "", "PEM file of the certificate: TCP is TLS then, 1.2 or later")
	f.StringVar(&cfg.key, "tls-key", "", "PEM file of its key")
	f.BoolVar(&cfg.insecure, "insecure", false, "allow other addresses than loopback without TLS: who listens on the way reads tokens and tensors")
	f.IntVar(&cfg.maxConnections, "max-connections", cfg.maxConnections, "most connections at once")
	f.Var(&cfg.maxRequest, "max-request", "most bytes of a tensor in a command or a reply")
	f.DurationVar(&cfg.idleTimeout, "idle-timeout", cfg.idleTimeout, "close connections on which no command starts for so long")
	f.BoolVar(&cfg.json, "json", false, "write events to standard output, one JSON object a line, in place of the log")
	return c
}

// check refuses what does not fit together.
func (cfg *dbConfig) check() error {
	switch {
	case len(cfg.listen) == 0 || len(cfg.listen) > 64:
		return errors.New("--listen: take 1 to 64 addresses")
	case cfg.onFull != "refuse" && cfg.onFull != "drop-gradients":
		return fmt.Errorf("--on-full %s: take refuse or drop-gradients", cfg.onFull)
	case cfg.saveEvery < 0 || cfg.saveEvery > 0 && cfg.saveEvery < time.Second:
		return fmt.Errorf("--save-every %v: take 0, for never, or at least 1s", cfg.saveEvery)
	case cfg.maxConnections < 1 || cfg.maxConnections > 1<<20:
		return fmt.Errorf("--max-connections %d: take 1 to %d", cfg.maxConnections, 1<<20)
	case cfg.idleTimeout <= 0:
		return fmt.Errorf("--idle-timeout %v is not positive", cfg.idleTimeout)
	case cfg.maxRequest < 4<<10 || cfg.maxRequest > math.MaxInt32:
		return fmt.Errorf("--max-request %v: take 4KiB to 2147483647B", &cfg.maxRequest)
	case (cfg.cert == "") != (cfg.key == ""):
		return errors.New("--tls-cert and --tls-key go together")
	case cfg.dir == "":
		return errors.New("--dir needs a folder, or none")
	case cfg.open && cfg.tokens != "":
		return errors.New("--open and --tokens exclude each other: who may connect without a token needs none")
	case cfg.dir == noFolder && cfg.tokens == "" && !cfg.open:
		return errors.New("without a folder there is no place for a token: give --tokens FILE, or --open to do without")
	}
	for _, a := range cfg.listen {
		if path, unix := strings.CutPrefix(a, "unix:"); unix {
			if path == "" {
				return fmt.Errorf("--listen %s names no socket: take unix:/path", a)
			}
			continue
		}
		host, port, err := net.SplitHostPort(a)
		if n, e := strconv.ParseUint(port, 10, 16); err != nil || e != nil || n > math.MaxUint16 {
			return fmt.Errorf("--listen %s: take host:port or unix:/path", a)
		}
		switch {
		case loopback(host):
		case cfg.open:
			return fmt.Errorf("--open --listen %s: whoever reaches that address could do everything; use tokens, or loopback or unix:/path", a)
		case cfg.cert == "" && !cfg.insecure:
			return fmt.Errorf("--listen %s is not loopback: tokens and tensors would cross the network unencrypted; give --tls-cert and --tls-key, or --insecure where the network is trusted", a)
		}
	}
	return nil
}

// loopback reports whether only this machine reaches host.
func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

func serveDB(ctx context.Context, cfg dbConfig, stdout, stderr io.Writer) (err error) {
	if err := cfg.check(); err != nil {
		return usage(err)
	}
	log := slog.New(slog.NewTextHandler(stderr, nil))
	if cfg.json {
		log = slog.New(slog.NewJSONHandler(stdout, &slog.HandlerOptions{ReplaceAttr: eventKeys}))
	}
	limit, whose := int64(cfg.memory), "as --memory says"
	if limit == 0 {
		limit, whose = machineMemory()/2>>20<<20, "half of this machine's"
		if limit == 0 {
			return usage(errors.New("this machine does not tell how much memory it has: give --memory"))
		}
	}
	certificates, err := cfg.certificates()
	if err != nil {
		return err
	}
	dbc := tensordb.Config{MaxMemory: limit, DropGradients: cfg.onFull == "drop-gradients", Logger: log}
	sc := tensordb.ServerConfig{
		Open: cfg.open, Version: spirt.Version(), Logger: log, MaxConns: cfg.maxConnections, MaxTokenConns: cfg.maxConnections,
		MaxBulk: int64(cfg.maxRequest), IdleTimeout: cfg.idleTimeout,
	}
	if cfg.dir != noFolder {
		if err := os.MkdirAll(cfg.dir, 0o700); err != nil {
			return err
		}
		release, err := spirt.LockFolder(cfg.dir)
		if err != nil {
			return err
		}
		defer release()
		dbc.Dir, sc.SaveAs = cfg.dir, checkpointName
	}
	tokenAt := cfg.tokens
	switch {
	case cfg.tokens != "":
		sc.Tokens, err = readTokens(cfg.tokens)
	case !cfg.open:
		tokenAt = filepath.Join(cfg.dir, tokenFile)
		sc.Tokens, err = ownToken(tokenAt)
	}
	if err != nil {
		return err
	}
	db, err := tensordb.Open(dbc)
	if err != nil {
		return err
	}
	defer db.Close()
	if dbc.Dir != "" {
		if _, err := db.Recover(checkpointName); err != nil && !errors.Is(err, tensordb.ErrNoCheckpoint) {
			return fmt.Errorf("%w (to begin anew, move the checkpoints out of %s)", err, cfg.dir)
		}
	}
	begun := db.Stats().LastVersion
	server := tensordb.NewServer(db, sc)
	defer server.Close()
	listeners, err := cfg.listeners(certificates)
	if err != nil {
		return err
	}
	if dbc.Dir == "" {
		log.Warn("nothing is kept: the tensors are gone when this ends", "because", "--dir none")
	}
	if cfg.insecure && cfg.cert == "" {
		log.Warn("TCP is not encrypted: who listens on the way reads tokens and tensors", "because", "--insecure")
	}
	served := make(chan error, len(listeners))
	var addresses []string
	for _, ln := range listeners {
		addresses = append(addresses, address(ln))
		go func() { served <- server.Serve(ln) }()
	}
	ready := []any{"listen", strings.Join(addresses, " "), "tls", cfg.cert != "", "memory", byteSize(limit).String(), "which_is", whose, "tensors", db.Stats().Keys, "version", sc.Version}
	if dbc.Dir != "" {
		ready = append(ready, "dir", cfg.dir)
	}
	if tokenAt != "" {
		ready = append(ready, "token_file", tokenAt)
	}
	log.Info("ready", ready...)

	failed := saveAndWait(ctx, cfg, db, server, served)
	server.Close() // waits for a checkpoint that is being written
	if dbc.Dir == "" {
		log.Info("stopped")
		return failed
	}
	if db.Stats().LastVersion == begun {
		log.Info("stopped: nothing has changed", "tensors", db.Stats().Keys)
		return failed
	}
	if err := server.Save(); err != nil {
		return errors.Join(failed, fmt.Errorf("the last checkpoint could not be written: %w", err))
	}
	log.Info("stopped", "tensors", db.Stats().Keys, "saved_in", cfg.dir)
	return failed
}

// saveAndWait writes a checkpoint now and then until ctx ends, or a listener
// fails.
func saveAndWait(ctx context.Context, cfg dbConfig, db *tensordb.DB, server *tensordb.Server, served <-chan error) error {
	var tick <-chan time.Time
	if cfg.saveEvery > 0 && cfg.dir != noFolder {
		ticker := time.NewTicker(cfg.saveEvery)
		defer ticker.Stop()
		tick = ticker.C
	}
	saved := db.Stats().LastVersion
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-served:
			return err
		case <-tick:
			if now := db.Stats().LastVersion; now != saved {
				if server.Save() == nil { // else the server logs it, or saves already
					saved = now
				}
			}
		}
	}
}

// eventKeys names the fields as those of other commands' events.
func eventKeys(_ []string, a slog.Attr) slog.Attr {
	switch a.Key {
	case slog.MessageKey:
		a.Key = "event"
	case slog.LevelKey:
		a.Value = slog.StringValue(strings.ToLower(a.Value.String()))
	}
	if d, ok := a.Value.Any().(time.Duration); ok {
		a.Value = slog.StringValue(d.String())
	}
	return a
}

func (cfg *dbConfig) certificates() (*tls.Config, error) {
	if cfg.cert == "" {
		return nil, nil
	}
	pair, err := tls.LoadX509KeyPair(cfg.cert, cfg.key)
	if err != nil {
		return nil, fmt.Errorf("--tls-cert %s, --tls-key %s: %w", cfg.cert, cfg.key, err)
	}
	return &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}, nil
}

// listeners opens all addresses, or none.
func (cfg *dbConfig) listeners(certificates *tls.Config) (list []net.Listener, err error) {
	defer func() {
		if err != nil {
			for _, ln := range list {
				ln.Close()
			}
		}
	}()
	for _, a := range cfg.listen {
		path, unix := strings.CutPrefix(a, "unix:")
		var ln net.Listener
		if unix {
			ln, err = tensordb.ListenUnix(path)
		} else if ln, err = net.Listen("tcp", a); err == nil && certificates != nil {
			ln = tls.NewListener(ln, certificates)
		}
		if err != nil {
			return list, fmt.Errorf("--listen %s: %w", a, err)
		}
		list = append(list, ln)
	}
	return list, nil
}

func address(ln net.Listener) string {
	if ln.Addr().Network() == "unix" {
		return "unix:" + ln.Addr().String()
	}
	return ln.Addr().String()
}

// readPrivate reads a file that holds secrets.
func readPrivate(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if runtime.GOOS != "windows" && info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s can be read by others (mode %04o): chmod 600 %s", path, info.Mode().Perm(), path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxTokenFile+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxTokenFile {
		return nil, fmt.Errorf("%s has more than %d bytes", path, maxTokenFile)
	}
	return b, nil
}

// ownToken returns the token in a file, which is made if it does not exist.
func ownToken(path string) ([]tensordb.Token, error) {
	secret := make([]byte, 32)
	rand.Read(secret) // never fails
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		_, err = f.WriteString(base64.RawURLEncoding.EncodeToString(secret) + "\n")
		if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
			os.Remove(path)
		}
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("making a token: %w", err)
	}
	b, err := readPrivate(path)
	if err != nil {
		return nil, err
	}
	token := strings.TrimSpace(string(b))
	if err := checkToken(token); err != nil {
		return nil, fmt.Errorf("%s: %w: remove the file to have one made", path, err)
	}
	return []tensordb.Token{{Secret: token, Access: tensordb.All}}, nil
}

// checkToken says what is wrong with a token, without telling it.
func checkToken(token string) error {
	switch {
	case len(token) < minToken:
		return fmt.Errorf("a token of %d bytes can be guessed: take at least %d", len(token), minToken)
	case len(token) > 4<<10:
		return fmt.Errorf("a token of %d bytes: take at most 4096", len(token))
	case strings.HasPrefix(token, "grant."):
		return errors.New(`a token that starts with "grant." would look like a signed one: take another`)
	}
	return nil
}

// readTokens reads the file of --tokens. Its errors have line and column, and
// never a token.
func readTokens(path string) ([]tensordb.Token, error) {
	b, err := readPrivate(path)
	if err != nil {
		return nil, usage(err)
	}
	list, err := parseTokens(b)
	if err != nil {
		return nil, usage(fmt.Errorf("%s: %w", path, err))
	}
	return list, nil
}

func parseTokens(b []byte) ([]tensordb.Token, error) {
	file, err := parser.ParseBytes(b, 0)
	if err != nil {
		return nil, yamlError(err)
	}
	if len(file.Docs) != 1 || file.Docs[0].Body == nil {
		return nil, errors.New("take one list of {token, access, prefix}")
	}
	rows, ok := file.Docs[0].Body.(*ast.SequenceNode)
	if !ok {
		return nil, fmt.Errorf("%s take a list of {token, access, prefix}", where(file.Docs[0].Body))
	}
	if len(rows.Values) == 0 || len(rows.Values) > maxTokens {
		return nil, fmt.Errorf("%d tokens: take 1 to %d", len(rows.Values), maxTokens)
	}
	seen := make(map[string]bool)
	var list []tensordb.Token
	for _, row := range rows.Values {
		var entry struct {
			Token, Access, Prefix string
		}
		if row.Type() != ast.MappingType && row.Type() != ast.MappingValueType {
			return nil, fmt.Errorf("%s take {token, access, prefix}", where(row))
		}
		if err := yaml.NodeToValue(row, &entry, yaml.Strict()); err != nil {
			return nil, yamlError(err)
		}
		if err := checkToken(entry.Token); err != nil {
			return nil, fmt.Errorf("%s %w", where(row), err)
		}
		if seen[entry.Token] {
			return nil, fmt.Errorf("%s this token is in the list already", where(row))
		}
		seen[entry.Token] = true
		access, ok := map[string]tensordb.Access{"all": tensordb.All, "function": tensordb.Function, "read": tensordb.ReadOnly}[entry.Access]
		if !ok {
			return nil, fmt.Errorf("%s access %.32q: take all, function or read", where(row), entry.Access)
		}
		if len(entry.Prefix) > 512 {
			return nil, fmt.Errorf("%s a prefix of %d bytes: keys have at most 512", where(row), len(entry.Prefix))
		}
		list = append(list, tensordb.Token{Secret: entry.Token, Access: access, Prefix: entry.Prefix})
	}
	return list, nil
}

// yamlError says where a YAML file is wrong, without the lines of the file:
// they have tokens.
func yamlError(err error) error {
	var at yaml.Error
	if !errors.As(err, &at) || at.GetToken() == nil {
		return errors.New("this is not the YAML of a list of {token, access, prefix}")
	}
	p := at.GetToken().Position
	if unknown := (*yaml.UnknownFieldError)(nil); errors.As(err, &unknown) {
		return fmt.Errorf("[%d:%d] %s: take token, access and prefix", p.Line, p.Column, unknown.Message)
	}
	return fmt.Errorf("[%d:%d] this is not the YAML of a list of {token, access, prefix}", p.Line, p.Column)
}

func where(n ast.Node) string {
	t := n.GetToken()
	if t == nil || t.Position == nil {
		return ""
	}
	return fmt.Sprintf("[%d:%d]", t.Position.Line, t.Position.Column)
}

// machineMemory is that of the machine, or of the container where that has
// less; 0 if it cannot be told.
func machineMemory() int64 {
	n := int64(min(memory.TotalMemory(), math.MaxInt64))
	if b, err := os.ReadFile("/sys/fs/cgroup/memory.max"); err == nil {
		if most, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64); err == nil && most > 0 {
			n = min(n, most)
		}
	}
	return n
}

// byteSize is a flag such as 4GB or 512MiB.
type byteSize int64

var byteUnits = []struct {
	name string
	n    int64
}{{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"TB", 1e12}, {"GB", 1e9}, {"MB", 1e6}, {"KB", 1e3}, {"B", 1}}

func (s *byteSize) Type() string { return "size" }

func (s byteSize) String() string {
	if s == 0 {
		return ""
	}
	best := byteUnits[len(byteUnits)-1] // the unit with which it is shortest
	for _, u := range byteUnits {
		if int64(s)%u.n == 0 && u.n > best.n {
			best = u
		}
	}
	return strconv.FormatInt(int64(s)/best.n, 10) + best.name
}

func (s *byteSize) Set(text string) error {
	for _, u := range byteUnits {
		if len(text) <= len(u.name) || !strings.EqualFold(text[len(text)-len(u.name):], u.name) {
			continue
		}
		x, err := strconv.ParseFloat(strings.TrimSpace(text[:len(text)-len(u.name)]), 64)
		if err != nil || !(x > 0) || x*float64(u.n) >= 1<<62 || x*float64(u.n) < 1 {
			break
		}
		*s = byteSize(x * float64(u.n))
		return nil
	}
	return errors.New("take a number with B, KB, MB, GB or TB, or KiB to TiB, such as 4GB or 512MiB")
}
