package function

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestHostileFunction has a function try what it must not: read the key and the folders of peers, the memory and
// environment of its peer and of another instance, write outside of its own folder, connect, and signal. The same
// deeds succeed without isolation. It is run as the user of the test, and where that is root also as nobody.
func TestHostileFunction(t *testing.T) {
	t.Run(fmt.Sprintf("user %d", os.Geteuid()), hostileFunction)
	if os.Geteuid() != 0 {
		return
	}
	t.Run("nobody", func(t *testing.T) {
		cmd := exec.Command(Self(), "-test.run=^TestHostileFunction$", "-test.v")
		cmd.Dir = "/"
		cmd.Env = append(os.Environ(), "TMPDIR=/tmp")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte("--- PASS: TestHostileFunction/user_65534")) {
			t.Fatalf("%v: %s", err, out)
		}
	})
}

func hostileFunction(t *testing.T) {
	dir, err := os.MkdirTemp("", "spirt") // short enough for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	file := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		os.MkdirAll(filepath.Dir(path), 0o755)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, name := range []string{dir, filepath.Join(dir, "own"), filepath.Join(dir, "other")} {
		os.Mkdir(name, 0o755)
		os.Chmod(name, 0o755)
	}
	key, other := file("peers/1/key", "secret"), file("peers/2/database/checkpoint", "another's")
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	sockets := map[string]string{}
	for _, name := range []string{"own", "other"} {
		path := filepath.Join(dir, name, "db.sock")
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		os.Chmod(path, 0o600)
		sockets[name] = path
	}
	abstract, err := net.Listen("unix", fmt.Sprintf("@spirt-test-%d", os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	defer abstract.Close()

	open := func(isolation Isolation) *Platform {
		t.Helper()
		p, err := New(Config{Name: "hostile", Command: []string{Self()}, Concurrency: 2, Retries: -1, Isolation: isolation})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Close() })
		return p
	}
	p := open(Isolation{Temp: true, Sockets: []string{sockets["own"]}})
	abi, own := landlockABI(), p.isolator.group != 0
	t.Logf("isolated by %s", p.Isolation())
	if own != (os.Geteuid() == 0 && mayChangeUser()) {
		t.Errorf("users of their own: %v", own)
	}
	// deeds with another instance of the platform as a victim
	deeds := func(p *Platform) (list []string, end func()) {
		events := watch(p)
		done := make(chan struct{})
		go func() { // ends with the platform
			defer close(done)
			p.Invoke(t.Context(), []byte(`{"do":"hang"}`))
		}()
		victim := await(t, events, "start", 1)[0]
		peer := os.Getpid()
		list = []string{"read " + key, "read " + other, "write " + filepath.Join(dir, "outside"), "write " + key, "read " + dir + "/peers"}
		for _, pid := range []int{peer, victim} {
			list = append(list, fmt.Sprintf("read /proc/%d/mem", pid), fmt.Sprintf("read /proc/%d/environ", pid), fmt.Sprintf("read /proc/%d/fd/1", pid))
		}
		tasks, _ := os.ReadDir("/proc/self/task") // also of the thread that is in the domain of the instance
		for _, task := range tasks {
			list = append(list, fmt.Sprintf("read /proc/%d/task/%s/mem", peer, task.Name()))
		}
		if abi >= 4 {
			list = append(list, "dial tcp:"+listener.Addr().String())
		}
		if abi >= 6 {
			list = append(list, "dial unix:"+abstract.Addr().String())
		}
		if own || p.isolator != nil && p.isolator.scope&unix.LANDLOCK_SCOPE_SIGNAL != 0 {
			list = append(list, fmt.Sprintf("signal %d", peer), fmt.Sprintf("signal %d", victim))
		}
		if own {
			list = append(list, "dial unix:"+sockets["other"])
		}
		return list, func() { <-done }
	}
	run := func(p *Platform, list []string) []string {
		body, _, err := p.Invoke(t.Context(), event(t, order{Do: "try", Value: strings.Join(list, "\n")}))
		if err != nil {
			t.Fatal(err)
		}
		if v := read(t, body).Value; v != "" {
			return strings.Split(v, "\n")
		}
		return nil
	}
	list, end := deeds(p)
	if abi == 0 && !own { // all that holds on such a kernel
		list = slices.DeleteFunc(list, func(deed string) bool { return !strings.HasPrefix(deed, fmt.Sprintf("read /proc/%d/", os.Getpid())) })
	}
	if done := run(p, list); len(done) > 0 {
		t.Errorf("a function could\n%s", strings.Join(done, "\n"))
	}
	may := []string{"dial unix:" + sockets["own"], "read /usr", "write /dev/null"}
	if done := run(p, may); !slices.Equal(done, may) {
		t.Errorf("of what it may it could only %q", done)
	}
	// Its own folder is there, and gone at the end.
	body, _, err := p.Invoke(t.Context(), event(t, order{Do: "env"}))
	if err != nil {
		t.Fatal(err)
	}
	temp := read(t, body).Env["TMPDIR"]
	if !strings.HasPrefix(filepath.Base(temp), "spirt-function-") {
		t.Errorf("TMPDIR is %q", temp)
	}
	own1 := []string{"write " + temp + "/x", "read " + temp + "/x"}
	if done := run(p, own1); !slices.Equal(done, own1) {
		t.Errorf("in its own folder it could only %q", done)
	}
	if status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", read(t, body).PID)); !bytes.Contains(status, []byte("NoNewPrivs:\t1")) {
		t.Errorf("it may gain privileges: %s", status)
	}
	p.Close()
	end()
	if _, err := os.Stat(temp); !os.IsNotExist(err) {
		t.Errorf("its folder is left: %v", err)
	}
	// Without isolation all of it works: the deeds are real. Memory stays closed where this user is not root.
	bare := open(Isolation{Off: true})
	list, end = deeds(bare)
	done := run(bare, list)
	for _, deed := range list {
		if strings.Contains(deed, "/task/") || os.Geteuid() != 0 && strings.HasPrefix(deed, fmt.Sprintf("read /proc/%d/", os.Getpid())) {
			continue // threads come and go
		}
		if !slices.Contains(done, deed) {
			t.Errorf("without isolation it could not %s", deed)
		}
	}
	bare.Close()
	end()
}

// What this process has open without close-on-exec does not reach an instance, and its limits are set.
func TestInheritedFiles(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(secret, unix.O_RDONLY, 0) // no O_CLOEXEC
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	p := platform(t, Config{Concurrency: 1})
	body, _, err := p.Invoke(t.Context(), event(t, order{Do: "echo"}))
	if err != nil {
		t.Fatal(err)
	}
	pid := read(t, body).PID
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil && os.Geteuid() == 0 {
		t.Fatal(err)
	}
	for _, f := range files {
		if at, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, f.Name())); at == secret {
			t.Errorf("the instance has %s open", at)
		}
	}
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]int{"Max core file size": 0, "Max open files": maxFiles}
	if p.isolator.group != 0 {
		want["Max processes"] = maxProcesses
	}
	for name, limit := range want {
		_, after, _ := strings.Cut(string(limits), name)
		if fields := strings.Fields(after); len(fields) < 2 || fields[1] != fmt.Sprint(limit) {
			t.Errorf("%s: %.60s, want %d", name, after, limit)
		}
	}
}

// Two instances have two users, and no two platforms the same.
func TestUsersOfTheirOwn(t *testing.T) {
	a, b := platform(t, Config{}), platform(t, Config{})
	if !mayChangeUser() {
		if a.isolator.group != 0 {
			t.Error("a user was taken that this process may not change to")
		}
		return
	}
	seen := map[int]bool{}
	for range 20 {
		for _, p := range []*Platform{a, b} {
			user := p.isolator.takeUser()
			if user < firstUser || user >= firstUser+users || seen[user] || user == a.isolator.group || user == b.isolator.group {
				t.Fatalf("user %d, after %v", user, seen)
			}
			seen[user] = true
		}
	}
}
