package function

import (
	"fmt"
	"os/exec"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/windows"
)

// processGroup is an instance's process with all that it starts, as a job object that ends with its last handle: when
// this process is killed the system closes the handle and with it ends the instance.
type processGroup struct {
	mu  sync.Mutex
	job windows.Handle
}

func newProcessGroup(cmd *exec.Cmd, _ *memoryGroup) *processGroup {
	cmd.SysProcAttr = &syscall.SysProcAttr{HideWindow: true}
	return &processGroup{}
}

// started puts the process into its job. What it starts before that is outside.
func (g *processGroup) started(cmd *exec.Cmd) error {
	job, err := windows.CreateJobObject(nil, nil)
	if err != nil {
		return fmt.Errorf("making a job object: %w", err)
	}
	var info windows.JOBOBJECT_EXTENDED_LIMIT_INFORMATION
	info.BasicLimitInformation.LimitFlags = windows.JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE
	_, err = windows.SetInformationJobObject(job, windows.JobObjectExtendedLimitInformation,
		uintptr(unsafe.Pointer(&info)), uint32(unsafe.Sizeof(info)))
	if err == nil {
		var process windows.Handle
		process, err = windows.OpenProcess(windows.PROCESS_SET_QUOTA|windows.PROCESS_TERMINATE, false, uint32(cmd.Process.Pid))
		if err == nil {
			err = windows.AssignProcessToJobObject(job, process)
			windows.CloseHandle(process)
		}
	}
	if err != nil {
		windows.CloseHandle(job)
		return fmt.Errorf("putting the process into a job object: %w", err)
	}
	g.mu.Lock()
	g.job = job
	g.mu.Unlock()
	return nil
}

// kill ends every process of the job.
func (g *processGroup) kill() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.job != 0 {
		windows.TerminateJobObject(g.job, 1)
	}
}

// wait waits until the process ends, and ends what is left of its job.
func (g *processGroup) wait(cmd *exec.Cmd) error {
	err := cmd.Wait()
	g.kill()
	return err
}

func (g *processGroup) close() {
	if g == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.job != 0 {
		windows.CloseHandle(g.job)
		g.job = 0
	}
}

func (g *processGroup) outOfMemory() bool { return false }

func (g *processGroup) memory(int) (resident, peak int64) { return 0, 0 }
