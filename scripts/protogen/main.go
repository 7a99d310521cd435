// Command protogen compiles every .proto file of the repository to Go, beside
// its source. It exists so that generated code can be rebuilt and checked on a
// machine that has Go and nothing else: the compiler is a Go library, and the
// generator is the protoc-gen-go that go.mod pins.
//
//	go run ./scripts/protogen           write the .pb.go files
//	go run ./scripts/protogen -check    exit 1, naming them, if any differs
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/bufbuild/protocompile"
	"github.com/bufbuild/protocompile/linker"
	"github.com/bufbuild/protocompile/protoutil"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/pluginpb"
)

func main() {
	check := flag.Bool("check", false, "write nothing; exit 1 if a generated file is missing, stale or left over")
	root := flag.String("root", "", "repository root (default: the nearest directory with a go.mod)")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "protogen: unexpected argument %q; it takes only flags\n", flag.Arg(0))
		os.Exit(2)
	}
	if err := run(context.Background(), *root, *check); err != nil {
		fmt.Fprintln(os.Stderr, "protogen:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, root string, check bool) error {
	if root == "" {
		var err error
		if root, err = moduleRoot(); err != nil {
			return err
		}
	}
	sources, existing, err := find(root)
	if err != nil {
		return err
	}
	var wanted map[string][]byte
	if len(sources) > 0 {
		if wanted, err = generate(ctx, root, sources); err != nil {
			return err
		}
	}
	if check {
		return compare(root, wanted, existing)
	}
	for name, content := range wanted {
		path := filepath.Join(root, filepath.FromSlash(name))
		if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, content) {
			continue
		}
		if err := os.WriteFile(path, content, 0o644); err != nil {
			return err
		}
		fmt.Println(name)
	}
	return nil
}

// moduleRoot walks up from the working directory to the nearest go.mod.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("no go.mod here or above; run it inside the repository or name it with -root")
		}
		dir = parent
	}
}

// find lists the .proto and the .pb.go files below root, by slash path.
func find(root string) (sources, generated []string, err error) {
	err = filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := entry.Name()
		if entry.IsDir() {
			if path != root && (strings.HasPrefix(name, ".") || name == "node_modules" || name == "testdata" || name == "vendor") {
				return filepath.SkipDir
			}
			return nil
		}
		relative, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		switch {
		case strings.HasSuffix(name, ".proto"):
			sources = append(sources, filepath.ToSlash(relative))
		case strings.HasSuffix(name, ".pb.go"):
			generated = append(generated, filepath.ToSlash(relative))
		}
		return nil
	})
	return sources, generated, err
}

// generate compiles the sources and runs the pinned protoc-gen-go on them. It
// returns the content of each generated file by slash path.
func generate(ctx context.Context, root string, sources []string) (map[string][]byte, error) {
	compiler := protocompile.Compiler{
		Resolver:       protocompile.WithStandardImports(&protocompile.SourceResolver{ImportPaths: []string{root}}),
		SourceInfoMode: protocompile.SourceInfoStandard, // comments reach the generated code
	}
	files, err := compiler.Compile(ctx, sources...)
	if err != nil {
		return nil, err
	}
	request, err := proto.Marshal(&pluginpb.CodeGeneratorRequest{
		FileToGenerate: sources,
		Parameter:      proto.String("paths=source_relative"),
		ProtoFile:      descriptors(files),
	})
	if err != nil {
		return nil, err
	}
	command := exec.CommandContext(ctx, "go", "tool", "protoc-gen-go")
	command.Dir = root
	command.Stdin = bytes.NewReader(request)
	command.Stderr = os.Stderr
	output, err := command.Output()
	if err != nil {
		return nil, fmt.Errorf("go tool protoc-gen-go: %w", err)
	}
	var response pluginpb.CodeGeneratorResponse
	if err := proto.Unmarshal(output, &response); err != nil {
		return nil, fmt.Errorf("answer of protoc-gen-go: %w", err)
	}
	if response.Error != nil {
		return nil, errors.New(response.GetError())
	}
	wanted := make(map[string][]byte, len(response.File))
	for _, file := range response.File {
		wanted[file.GetName()] = []byte(file.GetContent())
	}
	return wanted, nil
}

// descriptors returns the files and all they import, imports first, as the
// plugin protocol demands.
func descriptors(files linker.Files) []*descriptorpb.FileDescriptorProto {
	var ordered []*descriptorpb.FileDescriptorProto
	seen := make(map[string]bool)
	var visit func(file protoreflect.FileDescriptor)
	visit = func(file protoreflect.FileDescriptor) {
		if seen[file.Path()] {
			return
		}
		seen[file.Path()] = true
		imports := file.Imports()
		for i := range imports.Len() {
			visit(imports.Get(i).FileDescriptor)
		}
		ordered = append(ordered, protoutil.ProtoFromFileDescriptor(file))
	}
	for _, file := range files {
		visit(file)
	}
	return ordered
}

// compare reports every generated file that is missing, differs, or has lost
// its source.
func compare(root string, wanted map[string][]byte, existing []string) error {
	var problems []string
	for name, content := range wanted {
		got, err := os.ReadFile(filepath.Join(root, filepath.FromSlash(name)))
		switch {
		case errors.Is(err, fs.ErrNotExist):
			problems = append(problems, name+": missing")
		case err != nil:
			return err
		case !bytes.Equal(got, content):
			problems = append(problems, fmt.Sprintf("%s:%d: differs from what its .proto gives", name, firstDifference(got, content)))
		}
	}
	for _, name := range existing {
		if _, ok := wanted[name]; !ok {
			problems = append(problems, name+": has no .proto")
		}
	}
	if len(problems) == 0 {
		return nil
	}
	slices.Sort(problems)
	return fmt.Errorf("generated files are stale, run go run ./scripts/protogen:\n  %s", strings.Join(problems, "\n  "))
}

// firstDifference returns the number of the first line that differs.
func firstDifference(a, b []byte) int {
	line := 1
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return line
		}
		if a[i] == '\n' {
			line++
		}
	}
	return line
}
