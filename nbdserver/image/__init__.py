"""``nbdserver image``: images as files, for those who know qemu-img.

::

    cli           the group of commands          a module a command: its options, and what it does
    opening       layers over files and chains   allocation          who holds what of a disk
    copying       data from disk to disk         creation            new images, and their ``-o`` options
    parameters    options that commands share    progress, wording   what people see
    ahead         tasks on threads               remote              disks that NBD servers export

The commands know no format by name: they find layer classes in the registry, and ask which of the abilities in
`nbdserver.format` a class has. They run on plain files, without the engine.
"""
