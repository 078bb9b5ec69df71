package spirt

import (
	"bytes"
	"crypto/ed25519"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

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
	dir, spec := runOf(t, job), specOf(t, "lenet5")
	var first identities
	for n := 1; n <= job.Peers; n++ {
		ids, err := loadIdentities(dir, n, job, spec)
		check(t, err)
		if n == 1 {
			first = ids
		}
		if ids.job != first.job || ids.roster != first.roster || !reflect.DeepEqual(ids.members, first.members) {
			t.Errorf("peer %d sees another job or roster than peer 1", n)
		}
		if !ids.members[n-1].Equal(ids.key.Public()) {
			t.Errorf("peer %d is not member %d", n, n)
		}
	}
	other, err := loadIdentities(runOf(t, job), 1, job, spec)
	check(t, err)
	if other.job != first.job || other.roster == first.roster {
		t.Error("two runs of one job have one job and two rosters")
	}
}

func TestIdentitiesRefused(t *testing.T) {
	job := DefaultJob()
	spec := specOf(t, "lenet5")
	key := func(dir string, n int) string { return filepath.Join(peerDir(dir, n), keyFile) }
	read := func(path string) []byte {
		b, err := os.ReadFile(path)
		check(t, err)
		return b
	}
	roster := func(dir string, change func(lines []string) []string) {
		path := filepath.Join(dir, rosterFile)
		lines := strings.Split(strings.TrimSpace(string(read(path))), "\n") // comment, members:, one line each
		check(t, os.WriteFile(path, []byte(strings.Join(change(lines), "\n")+"\n"), 0o644))
	}
	for name, c := range map[string]struct {
		peer int
		harm func(dir string)
		says []string
	}{
		"key of another peer":    {1, func(dir string) { check(t, os.WriteFile(key(dir, 1), read(key(dir, 2)), 0o600)) }, []string{"the key of peer 1 is not the one in", rosterFile, "refused by the others"}},
		"no key":                 {1, func(dir string) { check(t, os.Remove(key(dir, 1))) }, []string{key("", 1)}},
		"garbage key":            {1, func(dir string) { check(t, os.WriteFile(key(dir, 1), []byte("key"), 0o600)) }, []string{key("", 1)}},
		"no roster":              {1, func(dir string) { check(t, os.Remove(filepath.Join(dir, rosterFile))) }, []string{rosterFile}},
		"a member too few":       {1, func(dir string) { roster(dir, func(l []string) []string { return l[:len(l)-1] }) }, []string{rosterFile, "3 members", "4 peers"}},
		"a member too many":      {1, func(dir string) { roster(dir, func(l []string) []string { return append(l, l[2]) }) }, []string{rosterFile, "5 members", "4 peers"}},
		"members in other order": {1, func(dir string) { roster(dir, func(l []string) []string { l[2], l[3] = l[3], l[2]; return l }) }, []string{"the key of peer 1"}},
		"garbage member":         {1, func(dir string) { roster(dir, func(l []string) []string { l[3] = "- 12D3Koo"; return l }) }, []string{rosterFile, "member 2", "12D3Koo"}},
		"another field":          {1, func(dir string) { roster(dir, func(l []string) []string { return append(l, "peers: 4") }) }, []string{rosterFile, "[7:1]", "peers"}},
		"peer 0":                 {0, func(string) {}, []string{"peer 0", "1 to 4"}},
		"peer 5":                 {5, func(string) {}, []string{"peer 5", "1 to 4"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := runOf(t, job)
			c.harm(dir)
			_, err := loadIdentities(dir, c.peer, job, spec)
			refused(t, err, c.says...)
		})
	}
	t.Run("a key that others can read", func(t *testing.T) {
		dir := runOf(t, job)
		check(t, os.Chmod(key(dir, 1), 0o644))
		_, err := loadIdentities(dir, 1, job, spec)
		if runtime.GOOS == "windows" { // has no such modes
			check(t, err)
			return
		}
		refused(t, err, key(dir, 1), "0644", "chmod 600")
	})
}

// fixedMembers are the same at every call.
func fixedMembers(n int) []ed25519.PublicKey {
	members := make([]ed25519.PublicKey, n)
	for i := range members {
		members[i] = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{byte(i + 1)}, ed25519.SeedSize)).Public().(ed25519.PublicKey)
	}
	return members
}

// The names must not change from one version to the next: peers of both would
// refuse each other. Who changes what is agreed on changes arithmeticVersion
// or the domain, and these.
func TestNameJobGolden(t *testing.T) {
	job, roster, err := nameJob(DefaultJob(), specOf(t, "lenet5"), fixedMembers(4))
	check(t, err)
	const wantJob, wantRoster = "eb7ad124da7f20135b7211b05ecbedb7885d6f6dde4b121def8c27235dfe9a92",
		"3f247b69964776d077740879bbc63a2b639e0dbabd6e140064ffd3eaafbc6620"
	if job.String() != wantJob || roster.String() != wantRoster {
		t.Errorf("the default job is named\n%s\nand its roster\n%s", job, roster)
	}
}

// Every field of a job is part of its name.
func TestNameJobDiffers(t *testing.T) {
	spec, members := specOf(t, "lenet5"), fixedMembers(4)
	name := func(j Job, spec nn.Spec, members []ed25519.PublicKey) [2]string {
		job, roster, err := nameJob(j, spec, members)
		check(t, err)
		return [2]string{job.String(), roster.String()}
	}
	seen := map[string]string{}
	note := func(what string, names [2]string) {
		for _, n := range names {
			if other := seen[n]; other != "" {
				t.Errorf("%s has a name of %s", what, other)
			}
			seen[n] = what
		}
	}
	base := DefaultJob()
	first := name(base, spec, members)
	note("the default job", first)
	if name(base, spec, members) != first {
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
				f.SetString(f.String() + "x")
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
			note(at, name(*j, spec, members))
			f.Set(old)
		}
	}
	change("", reflect.ValueOf(&base).Elem(), &base)
	if base != DefaultJob() {
		t.Fatalf("the job was not put back: %+v", base)
	}
	note("another spec", name(base, specOf(t, "mlp"), members))

	members[0], members[1] = members[1], members[0]
	if got := name(base, spec, members); got[0] != first[0] || seen[got[1]] != "" {
		t.Error("another order of members is the same job and another roster")
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

func FuzzRoster(f *testing.F) {
	var r roster
	for _, m := range fixedMembers(3) {
		id, err := p2p.ID(m)
		check(f, err)
		r.Members = append(r.Members, string(id))
	}
	b, err := yaml.Marshal(r)
	check(f, err)
	f.Add(b)
	f.Add([]byte("members: [12D3KooW]\n"))
	f.Add([]byte("members: &a [*a]\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 4096 {
			return
		}
		members, err := parseRoster(b)
		if err != nil {
			return
		}
		for _, m := range members {
			if len(m) != ed25519.PublicKeySize {
				t.Errorf("a key of %d bytes", len(m))
			}
		}
	})
}
