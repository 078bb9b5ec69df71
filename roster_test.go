package spirt

import (
	"bytes"
	"crypto/ed25519"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"testing"

	"github.com/spirt-ml/spirt/internal/membership"
	"github.com/spirt-ml/spirt/internal/treehash"
	"github.com/spirt-ml/spirt/nn"
	"github.com/spirt-ml/spirt/p2p"
)

func specOf(t testing.TB, model string) nn.Spec {
	t.Helper()
	spec, err := nn.Builtin(model)
	check(t, err)
	return spec
}

func TestIdentities(t *testing.T) {
	job := DefaultJob()
	dir := runOf(t, job)
	load := func(dir string, n int) (identities, error) {
		got, rosters, err := loadJob(dir)
		check(t, err)
		if got != job {
			t.Errorf("the job became %+v", got)
		}
		return loadIdentities(dir, n, rosters)
	}
	var first identities
	for n := 1; n <= job.Peers; n++ {
		ids, err := load(dir, n)
		check(t, err)
		if n == 1 {
			first = ids
		}
		if ids.job != first.job || ids.roster != first.roster {
			t.Errorf("peer %d sees another job or roster than peer 1", n)
		}
		if keys, ok := ids.rosters.members(ids.roster); !ok || !keys[n-1].Equal(ids.key.Public()) {
			t.Errorf("peer %d is not member %d", n, n)
		}
	}
	latest, start := first.rosters.latest()
	if latest != start || latest.F != 1 || len(latest.Members) != 4 || latest.Hash() != first.roster {
		t.Errorf("the roster is %+v", latest)
	}
	other, err := load(runOf(t, job), 1)
	check(t, err)
	if other.job == first.job || other.roster == first.roster {
		t.Error("two runs have one name")
	}
}

func TestIdentitiesRefused(t *testing.T) {
	job := DefaultJob()
	key := func(dir string, n int) string { return filepath.Join(peerDir(dir, n), keyFile) }
	read := func(path string) []byte {
		b, err := os.ReadFile(path)
		check(t, err)
		return b
	}
	roster := func(dir string) string {
		entries, err := os.ReadDir(filepath.Join(dir, rostersDir))
		check(t, err)
		if len(entries) != 1 {
			t.Fatalf("%d rosters", len(entries))
		}
		return filepath.Join(dir, rostersDir, entries[0].Name())
	}
	for name, c := range map[string]struct {
		peer int
		harm func(dir string)
		says []string
	}{
		"key of another peer":   {1, func(dir string) { check(t, os.WriteFile(key(dir, 1), read(key(dir, 2)), 0o600)) }, []string{"the key of peer 1 is not the one in", rostersDir, "refused by the others"}},
		"no key":                {1, func(dir string) { check(t, os.Remove(key(dir, 1))) }, []string{key("", 1)}},
		"garbage key":           {1, func(dir string) { check(t, os.WriteFile(key(dir, 1), []byte("key"), 0o600)) }, []string{key("", 1)}},
		"no genesis":            {1, func(dir string) { check(t, os.Remove(filepath.Join(dir, genesisFile))) }, []string{"no job in", genesisFile}},
		"garbage genesis":       {1, func(dir string) { check(t, os.WriteFile(filepath.Join(dir, genesisFile), []byte("x"), 0o644)) }, []string{genesisFile}},
		"no roster":             {1, func(dir string) { check(t, os.Remove(roster(dir))) }, []string{"there is no roster in", rostersDir}},
		"garbage roster":        {1, func(dir string) { check(t, os.WriteFile(roster(dir), []byte("x"), 0o644)) }, []string{rostersDir}},
		"roster of another job": {1, func(dir string) { check(t, os.WriteFile(roster(dir), read(roster(runOf(t, job))), 0o644)) }, []string{rostersDir, "it is of job"}},
		"a changed roster": {1, func(dir string) {
			r, err := membership.DecodeRoster(read(roster(dir)))
			check(t, err)
			r.Members[2].Minibatches = 9
			check(t, os.WriteFile(roster(dir), r.Encode(), 0o644))
		}, []string{rostersDir, "the signature of admin 1 is not right"}},
		"another job file": {1, func(dir string) {
			check(t, os.WriteFile(filepath.Join(dir, jobFile), []byte("rounds: 7\n"), 0o644))
		}, []string{jobFile, "restore the job file"}},
		"peer 0": {0, func(string) {}, []string{"peer 0", "1 to 4"}},
		"peer 5": {5, func(string) {}, []string{"peer 5", "1 to 4"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := runOf(t, job)
			c.harm(dir)
			_, rosters, err := loadJob(dir)
			if err == nil {
				_, err = loadIdentities(dir, c.peer, rosters)
			}
			refused(t, err, c.says...)
		})
	}
	t.Run("a key that others can read", func(t *testing.T) {
		dir := runOf(t, job)
		check(t, os.Chmod(key(dir, 1), 0o644))
		_, rosters, err := loadJob(dir)
		check(t, err)
		_, err = loadIdentities(dir, 1, rosters)
		if runtime.GOOS == "windows" { // has no such modes
			check(t, err)
			return
		}
		refused(t, err, key(dir, 1), "0644", "chmod 600")
	})
}

// What comes over the network is kept in the folder, and what another process
// puts there is found.
func TestRosters(t *testing.T) {
	dir := runOf(t, DefaultJob())
	_, here, err := loadJob(dir)
	check(t, err)
	_, there, err := loadJob(dir)
	check(t, err)
	admin, err := p2p.LoadKey(filepath.Join(dir, adminFile))
	check(t, err)
	latest, start := here.latest()
	next := latest.Successor()
	next.Remove(3)
	_, err = here.add(next)
	refused(t, err, "0 admins have signed it")
	check(t, next.Sign(here.genesis, admin))
	for i := range 2 {
		added, err := here.add(next)
		check(t, err)
		if added != (i == 0) {
			t.Errorf("added %v at time %d", added, i+1)
		}
	}
	found, err := there.rescan()
	check(t, err)
	if len(found) != 1 || found[0].Hash() != next.Hash() {
		t.Errorf("found %v", found)
	}
	if again, err := there.rescan(); err != nil || len(again) != 0 {
		t.Errorf("found again %v, %v", again, err)
	}
	latest, started := there.latest()
	if latest.Hash() != next.Hash() || started.Hash() != start.Hash() || there.get(next.Hash()) == nil || len(there.all()) != 2 {
		t.Errorf("%+v", latest)
	}
	if keys, ok := there.members(next.Hash()); !ok || len(keys) != 3 {
		t.Errorf("keys %v", keys)
	}
	if _, ok := there.members(treehash.Hash{}); ok {
		t.Error("an unknown roster is known")
	}
}

// A job may come from outside: what this program would not write itself is
// refused.
func TestJobOfRefuses(t *testing.T) {
	g, err := newGenesis(DefaultJob(), ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize)).Public().(ed25519.PublicKey))
	check(t, err)
	job, err := jobOf(g)
	check(t, err)
	if job != DefaultJob() {
		t.Errorf("the job became %+v", job)
	}
	for want, harm := range map[string]func(g *membership.Genesis){
		"arithmetic of version 99": func(g *membership.Genesis) { g.Arithmetic = 99 },
		"invalid character":        func(g *membership.Genesis) { g.Job = []byte("job") },
		"peers: 65": func(g *membership.Genesis) {
			g.Job = bytes.Replace(g.Job, []byte(`"Peers":4`), []byte(`"Peers":65`), 1)
		},
		"model": func(g *membership.Genesis) {
			g.Job = bytes.Replace(g.Job, []byte(`"Model":"lenet5"`), []byte(`"Model":"x"`), 1)
		},
		"does not know":   func(g *membership.Genesis) { g.Job = bytes.Replace(g.Job, []byte(`"Peers":4`), []byte(`"Pears":4`), 1) },
		"does not know: ": func(g *membership.Genesis) { g.Job = append(g.Job, ' ') },
		"program does not know": func(g *membership.Genesis) {
			g.Job = bytes.Replace(g.Job, []byte(`"Model":"lenet5"`), []byte(`"Model":"mlp"`), 1)
		},
	} {
		h := *g
		h.Job = bytes.Clone(g.Job)
		harm(&h)
		if bytes.Equal(h.Job, g.Job) && h.Arithmetic == g.Arithmetic {
			t.Fatalf("%s: nothing was harmed in %s", want, g.Job)
		}
		_, err := jobOf(&h)
		refused(t, err, want)
	}
}

// fixedGenesis is the same at every call.
func fixedGenesis(t testing.TB, job Job) *membership.Genesis {
	t.Helper()
	g, err := newGenesis(job, ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize)).Public().(ed25519.PublicKey))
	check(t, err)
	g.Nonce = [16]byte{}
	return g
}

// The name must not change from one version to the next: peers of both would
// refuse each other. Who changes what is agreed on changes arithmeticVersion,
// and this.
func TestJobGolden(t *testing.T) {
	const want = "e327b8dc2376b9550d8f4fb14e54ee437186d3d7f372688b467f008d3f489d55"
	if got := fixedGenesis(t, DefaultJob()).ID().String(); got != want {
		t.Errorf("the default job is named\n%s", got)
	}
}

// Every field of a job is part of its name.
func TestJobNamesDiffer(t *testing.T) {
	seen := map[treehash.Hash]string{}
	note := func(what string, j Job) {
		h := fixedGenesis(t, j).ID()
		if other := seen[h]; other != "" {
			t.Errorf("%s has the name of %s", what, other)
		}
		seen[h] = what
	}
	base := DefaultJob()
	note("the default job", base)
	if again := fixedGenesis(t, base).ID(); fixedGenesis(t, base).ID() != again {
		t.Error("one job has two names")
	}
	var change func(path string, v reflect.Value, j *Job)
	change = func(path string, v reflect.Value, j *Job) {
		for i := range v.NumField() {
			f, at := v.Field(i), path+v.Type().Field(i).Name
			old := reflect.ValueOf(f.Interface())
			switch f.Kind() {
			case reflect.Struct:
				change(at+".", f, j)
				continue
			case reflect.String:
				if at == "Model" { // decides the spec too
					f.SetString("mlp")
				} else {
					f.SetString(f.String() + "x")
				}
			case reflect.Int, reflect.Int64:
				f.SetInt(f.Int() + 1)
			case reflect.Uint64:
				f.SetUint(f.Uint() + 1)
			case reflect.Float32:
				f.SetFloat(float64(math.Nextafter32(float32(f.Float()), 1)))
			case reflect.Float64:
				f.SetFloat(math.Nextafter(f.Float(), 1))
			default:
				t.Fatalf("%s is a %v: say here how to change it", at, f.Kind())
			}
			note(at, *j)
			f.Set(old)
		}
	}
	change("", reflect.ValueOf(&base).Elem(), &base)
	if base != DefaultJob() {
		t.Fatalf("the job was not put back: %+v", base)
	}
}

func TestPeerAddresses(t *testing.T) {
	for first, want := range map[string][]string{
		"":               {"127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0"},
		"10.0.0.1:0":     {"10.0.0.1:0", "10.0.0.1:0", "10.0.0.1:0"},
		"10.0.0.1:7000":  {"10.0.0.1:7000", "10.0.0.1:7001", "10.0.0.1:7002"},
		"[::1]:65533":    {"[::1]:65533", "[::1]:65534", "[::1]:65535"},
		"localhost:7000": {"localhost:7000", "localhost:7001", "localhost:7002"},
	} {
		got, err := peerAddresses(first, 3)
		check(t, err)
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %q, want %q", first, got, want)
		}
	}
	for _, first := range []string{"7000", "127.0.0.1", "127.0.0.1:port", "127.0.0.1:-1", "127.0.0.1:65534", "::1:7000"} {
		_, err := peerAddresses(first, 3)
		refused(t, err, "listen address", first)
	}
}

func TestCreateRunRefuses(t *testing.T) {
	dir := runOf(t, Job{Peers: 1})
	err := createRun(dir, DefaultJob())
	refused(t, err, dir, "exists", "--run")
	if _, ok := err.(*UsageError); !ok {
		t.Errorf("%T is no UsageError", err)
	}
}

func FuzzJobOf(f *testing.F) {
	f.Add(fixedGenesis(f, DefaultJob()).Job)
	f.Add([]byte(`{"Job":{"Peers":3},"Spec":{}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		job, err := jobOf(&membership.Genesis{Arithmetic: arithmeticVersion, Job: b})
		if err != nil {
			return
		}
		again := job
		check(t, again.Resolve())
		if again != job {
			t.Error("a job that is not resolved")
		}
	})
}
