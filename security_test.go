package spirt

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/spirt-ml/spirt/p2p"
	"github.com/spirt-ml/spirt/tensordb"
)

// TestSecretsStaySecret trains with two peers that log all they can, and looks
// for their keys, the admin's and the tokens of their functions in every file,
// log, command line and environment.
func TestSecretsStaySecret(t *testing.T) {
	job := smallJob(6)
	job.Peers = 2
	dir := runOf(t, job)
	var mu sync.Mutex
	var log bytes.Buffer
	logger := slog.New(slog.NewTextHandler(locked{&mu, &log}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	p2p.LogLibrary(logger.Handler())
	var secrets []string
	var peers []*peer
	for n := 1; n <= job.Peers; n++ {
		cfg := alone(dir)
		cfg.Peer, cfg.Logger = n, logger
		p, err := openPeer(cfg)
		check(t, err)
		defer p.close()
		peers = append(peers, p)
		secrets = append(secrets, spellings(p.ids.key.Seed())...)
		sign := p.computer.sign
		p.computer.sign = func(g tensordb.Grant) (string, error) {
			token, err := sign(g)
			mu.Lock()
			defer mu.Unlock()
			secrets = append(secrets, token, token[strings.LastIndexByte(token, '.')+1:])
			return token, err
		}
	}
	admin, err := p2p.LoadKey(filepath.Join(dir, adminFile))
	check(t, err)
	secrets = append(secrets, spellings(admin.Seed())...)
	keys := len(secrets)
	var wg sync.WaitGroup
	for _, p := range peers {
		wg.Go(func() {
			if err := p.run(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(secrets) == keys {
		t.Fatal("no function was given a token")
	}
	find := func(where string, b []byte) (found bool) {
		for _, s := range secrets {
			if bytes.Contains(b, []byte(s)) {
				found = true
			}
		}
		return found
	}
	for _, p := range peers {
		for _, in := range p.platform.Instances() {
			for _, file := range []string{"cmdline", "environ"} {
				b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", in.PID, file))
				if err == nil && find(file, b) { // there is no such file on other systems
					t.Errorf("the %s of an instance has a secret", file)
				}
			}
		}
		check(t, p.close())
	}
	if find("log", log.Bytes()) {
		t.Errorf("the log has a secret")
	}
	files, inKeys := 0, 0
	check(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		files++
		info, err := d.Info()
		if err != nil {
			return err
		}
		switch found := find(path, b); {
		case filepath.Base(path) == keyFile, filepath.Base(path) == adminFile:
			if !found {
				t.Errorf("the key is not found in %s, so this test finds nothing", path)
			}
			inKeys++
			if os.PathSeparator == '/' && info.Mode().Perm() != 0o600 {
				t.Errorf("%s has mode %v", path, info.Mode())
			}
		case found:
			t.Errorf("%s has a secret", path)
		}
		return nil
	}))
	if inKeys != job.Peers+1 || files < 10 || log.Len() == 0 {
		t.Errorf("%d keys in %d files, a log of %d bytes", inKeys, files, log.Len())
	}
}

// spellings are the ways in which a program may write secret bytes.
func spellings(b []byte) []string {
	list := []string{string(b), hex.EncodeToString(b), strings.ToUpper(hex.EncodeToString(b)), strings.Trim(fmt.Sprint(b), "[]")}
	for shift := range 3 { // base64 depends on what stands before
		text := base64.RawStdEncoding.EncodeToString(append(make([]byte, shift), b...))
		text = text[4*((shift+2)/3) : len(text)-2]
		list = append(list, text, strings.NewReplacer("+", "-", "/", "_").Replace(text))
	}
	return list
}

type locked struct {
	mu *sync.Mutex
	b  *bytes.Buffer
}

func (l locked) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}
